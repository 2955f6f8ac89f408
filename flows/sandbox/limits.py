"""What one audit may use, and how a running one is measured against it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from flows.settings.environment import GradauditSettings

_GIB = 2**30
_MIB = 2**20

#: More files than this in an audit's private folder are an attack on the disk's inodes; an honest audit leaves a few.
MAXIMUM_ENTRIES = 1_000

#: And folders nested deeper than this one on whoever walks them.
MAXIMUM_DEPTH = 50


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
        descriptors: open files, sockets and pipes of one process.
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
    descriptors: int = 1024

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


def excess_on_disk(folder: Path, limits: Limits, nameless_bytes: int = 0) -> str | None:
    """Return what is too much in ``folder``, or None; what cannot be looked at is too much.

    Symbolic links are counted, never followed. Folders are opened from the one above, so that no path grows too long.
    """
    total, entries = nameless_bytes, 0
    pending: list[tuple[int, list[str]]] = []

    def opened(name: str, above: int | None) -> str | None:
        nonlocal total, entries
        place = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
        pending.append((place, folders := []))
        with os.scandir(place) as found:
            for entry in found:
                entries += 1
                if entries > MAXIMUM_ENTRIES:
                    return f"more than {MAXIMUM_ENTRIES:,} files"
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.name)
                else:
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
        return f"folders nested deeper than {MAXIMUM_DEPTH}" if len(pending) > MAXIMUM_DEPTH else None

    try:
        excess = opened(str(folder), None)
        while pending and excess is None:
            place, folders = pending[-1]
            if not folders:
                os.close(pending.pop()[0])
                continue
            try:
                excess = opened(folders.pop(), place)
            except FileNotFoundError:  # gone meanwhile
                continue
    except FileNotFoundError:
        excess = None
    except OSError as error:
        return f"a folder that cannot be looked into ({error.strerror})"
    finally:
        for place, _ in pending:
            os.close(place)
    return excess or (f"{total / _MIB:.0f} MiB" if total > limits.answer_bytes else None)


def limits_of(settings: GradauditSettings) -> Limits:
    """Return the limits in the settings; no memory limit given means 80 % of the machine's."""
    return Limits(
        seconds=settings.time_limit,
        memory_bytes=int(settings.memory_limit * _GIB) if settings.memory_limit else int(0.8 * machine_memory()),
        file_bytes=int(settings.file_limit * _GIB),
        cpu_seconds=settings.cpu_limit,
        processes=settings.process_limit,
        answer_bytes=int(settings.answer_limit * _GIB),
        log_bytes=int(settings.log_limit * _GIB),
        scratch_bytes=int(settings.scratch_limit * _GIB),
    )
