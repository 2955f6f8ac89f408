"""What an attack would touch if it got out: a listening socket, a canary file, a planted secret."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ATTACKS = Path(__file__).parent / "attacks"


@dataclass
class Witnesses:
    """Planted around one attack; ``findings`` says what it touched."""

    outside: Path
    home: Path
    secret: str
    listeners: list[socket.socket] = field(default_factory=list)

    @classmethod
    def plant(cls, folder: Path) -> Witnesses:
        outside, home = folder / "outside", folder / "user-home"
        outside.mkdir()
        (home / ".aws").mkdir(parents=True)
        secret = f"planted-{os.urandom(8).hex()}"
        (home / ".aws" / "credentials").write_text(f"aws_secret_access_key={secret}\n")
        (outside / "canary").write_text("untouched\n")
        inet = socket.create_server(("127.0.0.1", 0))
        listeners = [inet]
        if sys.platform == "linux":
            abstract = socket.socket(socket.AF_UNIX)
            abstract.bind(f"\0gradaudit-{secret}")
            abstract.listen()
            listeners.append(abstract)
        for listener in listeners:
            listener.setblocking(False)
        return cls(outside, home, secret, listeners)

    def targets(self, *, snapshot: Path, **more: Any) -> dict[str, Any]:
        import registry_models

        return {
            "secret": self.secret,
            "home_file": str(self.home / ".aws" / "credentials"),
            "port": self.listeners[0].getsockname()[1],
            "abstract": f"\0gradaudit-{self.secret}",
            "canary": str(self.outside / "canary"),
            "outside": str(self.outside),
            "snapshot": str(snapshot),
            "precious": [os.devnull + "/..", "/etc/passwd", str(registry_models.__file__), sys.prefix + "/pyvenv.cfg"],
            **more,
        }

    def findings(self, *folders: Path, texts: tuple[str, ...] = ()) -> set[str]:
        """What was touched: ``connection``, ``outside``, ``secret`` (found in the folders or texts)."""
        found = set()
        for listener in self.listeners:
            with contextlib.suppress(BlockingIOError):
                listener.accept()[0].close()
                found.add("connection")
        if (self.outside / "canary").read_text() != "untouched\n" or len(list(self.outside.iterdir())) != 1:
            found.add("outside")
        files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
        if any(self.secret.encode() in path.read_bytes() for path in files) or any(
            self.secret in text for text in texts
        ):
            found.add("secret")
        return found

    def close(self) -> None:
        for listener in self.listeners:
            listener.close()


def attack_source(name: str, targets: dict[str, Any]) -> str:
    """The code of one attack with what it aims at."""
    return f"import json\nTARGETS = json.loads({json.dumps(targets)!r})\n" + (ATTACKS / f"{name}.py").read_text()
