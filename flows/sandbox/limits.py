"""What one audit may use, and how a running one is measured against it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_GIB = 2**30
_MIB = 2**20

#: More entries than this in an answer folder are an attack on the disk's inodes; an honest answer has three.
MAXIMUM_ENTRIES = 1_000


@dataclass(frozen=True)
class Limits:
    """What one audit may use; past a limit it is ended with everything it started.

    Attributes:
        seconds: wall clock.
        memory_bytes: resident memory of all of its processes together.
        file_bytes: largest single file.
        cpu_seconds: processor time of one process; 0 is ``seconds`` times the number of cores.
        processes: processes and threads at one time; 0 is 256 and 8 for each core.
        answer_bytes: everything it leaves on disk.
        log_bytes: everything it prints.
        scratch_bytes: size of each of its private in-memory file systems, ``/tmp`` and ``/dev/shm`` (bubblewrap only).
    """

    seconds: float
    memory_bytes: int
    file_bytes: int
    cpu_seconds: float = 0.0
    processes: int = 0
    answer_bytes: int = 512 * _MIB
    log_bytes: int = 16 * _MIB
    scratch_bytes: int = 2 * _GIB

    @property
    def cpu(self) -> int:
        """Whole seconds of processor time for one process."""
        cores = max(1, os.cpu_count() or 1)
        return max(1, int(self.cpu_seconds or self.seconds * cores + 1))

    @property
    def tasks(self) -> int:
        """Processes and threads at one time: torch starts a few pools of one thread a core."""
        return self.processes or 256 + 8 * max(1, os.cpu_count() or 1)


def machine_memory() -> int:
    """Return the machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def excess_on_disk(folder: Path, limits: Limits) -> str | None:
    """Return what is too much in ``folder``, or None.

    Symbolic links are counted, never followed.
    """
    total = entries = 0
    pending = [str(folder)]
    while pending:
        try:
            found = os.scandir(pending.pop())
        except OSError:
            continue
        with found:
            for entry in found:
                entries += 1
                try:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    else:
                        total += entry.stat(follow_symlinks=False).st_blocks * 512
                except OSError:
                    continue
                if entries > MAXIMUM_ENTRIES:
                    return f"more than {MAXIMUM_ENTRIES:,} files"
    return f"{total / _MIB:.0f} MiB" if total > limits.answer_bytes else None
