"""Everything an audit's process has started: measured while it runs, ended together."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

#: How long the end of a killed process is awaited, in seconds; one stuck in a device driver can take this long.
_PATIENCE = 5.0


@dataclass(frozen=True)
class _Process:
    parent: int
    session: int
    started: int
    tasks: int
    memory_bytes: int
    cpu_seconds: float
    zombie: bool


@dataclass(frozen=True)
class Usage:
    """What the tree uses at one moment."""

    tasks: int
    memory_bytes: int
    cpu_seconds: float
    nameless_bytes: int = 0


class ProcessTree:
    """The descendants of one process, seen from outside: also into a process namespace below it.

    A process that left its session, or whose parent has ended, is still known once it has been seen. Where there is
    a process namespace the kernel ends all of it with its first process; this class then only confirms it.

    Args:
        leader: process id of the first process, the leader of its session.
    """

    def __init__(self, leader: int) -> None:
        self.leader = leader
        self._known: dict[int, int] = {}
        self._leader_started: int | None = None

    def look(self) -> Usage:
        """Measure the tree (Linux; zeros elsewhere)."""
        members = self._members()
        return Usage(
            tasks=sum(member.tasks for member in members.values()),
            memory_bytes=sum(member.memory_bytes for member in members.values()),
            cpu_seconds=max((member.cpu_seconds for member in members.values()), default=0.0),
            nameless_bytes=_nameless_bytes(members),
        )

    def end(self) -> None:
        """Kill the tree and wait until nothing of it runs."""
        if not self._replaced(_processes()):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.leader, signal.SIGKILL)
        deadline = time.monotonic() + _PATIENCE
        while members := {pid for pid, member in self._members().items() if not member.zombie}:
            for pid in members:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                return
            time.sleep(0.01)

    def _members(self) -> dict[int, _Process]:
        table = _processes()
        children: dict[int, list[int]] = {}
        for pid, process in table.items():
            children.setdefault(process.parent, []).append(pid)
        seen = {pid for pid, started in self._known.items() if pid in table and table[pid].started == started}
        pending = [*seen]
        if not self._replaced(table):
            pending += [self.leader, *(pid for pid, process in table.items() if process.session == self.leader)]
        found: dict[int, _Process] = {}
        while pending:
            pid = pending.pop()
            if pid not in found and pid in table:
                found[pid] = table[pid]
                pending.extend(children.get(pid, ()))
        self._known = {pid: process.started for pid, process in found.items()}
        return found

    def _replaced(self, table: dict[int, _Process]) -> bool:
        """Whether the leader's process id is by now a stranger's."""
        leader = table.get(self.leader)
        if leader is not None and self._leader_started is None:
            self._leader_started = leader.started
        return leader is not None and leader.started != self._leader_started


def _nameless_bytes(pids: Iterable[int]) -> int:
    """Return what open files without a name take on disks: a walk over names does not see them."""
    found: dict[tuple[int, int], int] = {}
    for pid in pids:
        with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as handles:
            for handle in handles:
                with contextlib.suppress(OSError):
                    about = os.stat(handle.path)
                    if stat.S_ISREG(about.st_mode) and not about.st_nlink:
                        found[about.st_dev, about.st_ino] = about.st_blocks * 512
    return sum(found.values())


def tasks_of_user() -> int:
    """Return how many processes and threads this user runs now (Linux; 0 elsewhere)."""
    return sum(process.tasks for pid, process in _processes().items() if _owner(pid) == os.getuid())


def _owner(pid: int) -> int | None:
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return None


def _page_tables(entry: str) -> int:
    """Bytes of a process's page tables, which its resident memory leaves out and which can be as large."""
    for line in Path(f"/proc/{entry}/status").read_text(errors="replace").splitlines():
        if line.startswith("VmPTE:"):
            return int(line.split()[1]) * 1024
    return 0


def _processes() -> dict[int, _Process]:
    page, tick = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")
    table = {}
    try:
        entries = os.listdir("/proc")
    except OSError:
        return {}
    for entry in entries:
        if not entry.isdigit():
            continue
        try:
            # The second field, a name in brackets, may itself hold brackets and blanks: count from its end.
            fields = Path(f"/proc/{entry}/stat").read_text(errors="replace").rpartition(")")[2].split()
            table[int(entry)] = _Process(
                parent=int(fields[1]),
                session=int(fields[3]),
                started=int(fields[19]),
                tasks=int(fields[17]),
                memory_bytes=int(fields[21]) * page + _page_tables(entry),
                cpu_seconds=(int(fields[11]) + int(fields[12])) / tick,
                zombie=fields[0] in "ZX",
            )
        except (OSError, ValueError, IndexError):
            continue
    return table
