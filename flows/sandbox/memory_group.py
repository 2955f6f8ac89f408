"""A memory cgroup around one audit, where the host lets one be made: it counts what no process is seen to hold.

Buffers of sockets and pipes, page tables and files in memory are the kernel's; polling of resident memory does not see
them. Version 2 of cgroups and version 1 of the memory controller are known.

Reference: Linux, Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flows.sandbox.limits import Limits

_ROOT = Path("/sys/fs/cgroup")

#: What the sandbox's own first process and the program's image may need beside what is limited.
_MARGIN = 64 * 2**20

#: How long the end of the last process in the group is awaited, in seconds.
_PATIENCE = 2.0


@dataclass(frozen=True)
class MemoryGroup:
    """A group of its own; ``folder`` is where the kernel shows it."""

    folder: Path

    def enter(self) -> None:
        """Put the calling process, and all it will start, into the group."""
        with contextlib.suppress(OSError):
            (self.folder / "cgroup.procs").write_text("0")

    @property
    def ran_out(self) -> bool:
        """Whether the kernel ended a process because the group was full."""
        for name in ("memory.events", "memory.oom_control"):
            with contextlib.suppress(OSError):
                for line in (self.folder / name).read_text().splitlines():
                    if line.startswith("oom_kill ") and int(line.split()[1]):
                        return True
        return False


@contextlib.contextmanager
def memory_group(limits: Limits) -> Iterator[MemoryGroup | None]:
    """Make a group that holds the audit's memory and its in-memory file systems; None where there cannot be one.

    Args:
        limits: what the audit may use.
    """
    made = _made(limits.memory_bytes + 2 * limits.scratch_bytes + _MARGIN)
    try:
        yield made
    finally:
        deadline = time.monotonic() + _PATIENCE
        while made is not None:
            try:
                made.folder.rmdir()
                break
            except FileNotFoundError:
                break
            except OSError:
                if time.monotonic() > deadline:
                    break
                time.sleep(0.02)


def _made(limit: int) -> MemoryGroup | None:
    name = f"gradaudit-{os.getpid()}-{secrets.token_hex(4)}"
    for above, bounds in _places():
        folder = above / name
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            (folder / bounds[0]).write_text(str(limit))
            for further in bounds[1:]:
                with contextlib.suppress(OSError):  # a kernel without swap has no such file
                    (folder / further).write_text("0" if further.endswith("swap.max") else str(limit))
            return MemoryGroup(folder)
        except OSError:
            with contextlib.suppress(OSError):
                folder.rmdir()
    return None


def _places() -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Folders in which a group may be made, with the files that bound it."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if controllers == "memory":
            yield _ROOT / "memory" / path.strip("/"), ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
        elif number == "0" and (_ROOT / "cgroup.controllers").is_file():
            own = _ROOT / path.strip("/")
            # A group with processes in it has no groups below with controllers: then one beside it.
            yield own, ("memory.max", "memory.swap.max")
            if own != _ROOT:
                yield own.parent, ("memory.max", "memory.swap.max")
