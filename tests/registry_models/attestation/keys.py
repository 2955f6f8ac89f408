"""Key pairs as a user makes them: with openssl, as docs/how_to/attest.md says."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[3] / "docs" / "how_to" / "attest.md"

#: What openssl calls the algorithms, with their options.
ALGORITHMS = {"ed25519": ["ed25519"], "ecdsa": ["EC", "-pkeyopt", "ec_paramgen_curve:P-256"]}


def make_keys(folder: Path, algorithm: str = "ed25519") -> tuple[Path, Path]:
    """Return the files of a private key and its public one, made by the page's commands."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    folder.mkdir(parents=True, exist_ok=True)
    commands = re.findall(r"^openssl .*$", PAGE.read_text(), flags=re.M)
    assert len(commands) == 2
    for command in commands:
        words = shlex.split(command)
        at = words.index("-algorithm") if "-algorithm" in words else None
        if at is not None:
            words[at + 1 : at + 2] = ALGORITHMS[algorithm]
        subprocess.run(words, cwd=folder, check=True, capture_output=True)
    return folder / "gate.pem", folder / "gate.pub"
