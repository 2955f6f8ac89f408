"""The child process of one audit: its own process group, a scrubbed environment, limits, and a way to end it."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from audits.errors import InfrastructureError
from flows.processes import die_with_parent

#: Variables a child may see; everything else, credentials above all, stays out.
_PASSED = (
    "PATH",
    "LANG",
    "LC_ALL",
    "TZ",
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_VISIBLE_DEVICES",
    "LD_LIBRARY_PATH",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
)

#: How often a running child's memory is looked at, in seconds.
_POLL = 0.1
_GIB = 2**30


@dataclass(frozen=True)
class Limits:
    """What one audit may use."""

    seconds: float
    memory_bytes: int
    file_bytes: int


@dataclass(frozen=True)
class ChildEnd:
    """How a child ended: ``cause`` is None when it came to its own end with exit code 0."""

    cause: str | None
    message: str
    seconds: float
    log: str


def limits_of(*, seconds: float, memory_gib: float, file_gib: float) -> Limits:
    """Return limits; no memory limit given means 80 % of the machine's."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory = int(memory_gib * _GIB) if memory_gib else int(0.8 * total)
    return Limits(seconds, memory, int(file_gib * _GIB))


def run_child(request: dict[str, Any], folder: Path, limits: Limits) -> ChildEnd:
    """Run ``registry_models.child`` on ``request`` and wait for its end.

    The child runs in a process group and session of its own, with a private home and temporary folder, no variable
    but a few harmless ones, and no descriptor of its parent's. Past a limit the whole group is killed.

    Raises:
        InfrastructureError: the process cannot be started.
    """
    home = folder / "home"
    home.mkdir()
    request_file = folder / "request.json"
    request_file.write_text(json.dumps(request), encoding="utf-8")
    environment = {name: os.environ[name] for name in _PASSED if name in os.environ}
    environment |= {
        "HOME": str(home),
        "TMPDIR": str(home),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",
        # Threads that spin while they wait starve every other audit on the machine: two audits of a small model on
        # two cores took 75 s each, with this 2.7 s.
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONPATH": _own_root(),
        "MPLBACKEND": "Agg",
    }
    log = folder / "child.log"
    began, parent = time.monotonic(), os.getpid()
    try:
        with log.open("wb") as sink:
            process = subprocess.Popen(
                [sys.executable, "-m", "registry_models.child", str(request_file)],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                env=environment,
                cwd=home,
                close_fds=True,
                start_new_session=True,
                preexec_fn=lambda: _prepare(limits, parent),
            )
    except OSError as error:
        raise InfrastructureError(f"an audit's process could not be started: {error}") from error
    try:
        cause, message = _wait(process, limits, began)
    finally:
        _kill_group(process)
        shutil.rmtree(home, ignore_errors=True)
    tail = log.read_bytes()[-4000:].decode("utf-8", "replace")
    return ChildEnd(cause, message, time.monotonic() - began, tail)


def _wait(process: subprocess.Popen[bytes], limits: Limits, began: float) -> tuple[str | None, str]:
    while True:
        try:
            code = process.wait(timeout=_POLL)
            break
        except subprocess.TimeoutExpired:
            pass
        if time.monotonic() - began > limits.seconds:
            return (
                "time limit",
                f"the audit was ended after {limits.seconds:.0f} s, its time limit: does the model hang?",
            )
        held = _group_memory(process.pid)
        if held > limits.memory_bytes:
            return "memory limit", (
                f"the audit was ended at {held / _GIB:.1f} GiB, its memory limit ({limits.memory_bytes / _GIB:.1f} GiB)"
            )
    if code == 0:
        return None, ""
    if code < 0:
        name = signal.Signals(-code).name
        if -code == signal.SIGXCPU:
            return "time limit", "the audit used up its CPU time"
        return "crashed", f"the audit's process was ended by {name}: the model's code or a native kernel crashed"
    return "crashed", f"the audit's process ended with exit code {code} and gave no answer"


def _prepare(limits: Limits, parent: int) -> None:
    """In the child, before it runs anything: die with the parent, and stay within the limits."""
    die_with_parent(parent)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits.file_bytes, limits.file_bytes))
    cpu = int(limits.seconds * max(1, os.cpu_count() or 1)) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))


def _group_memory(leader: int) -> int:
    """Resident bytes of all processes in the child's session (Linux; 0 elsewhere)."""
    total, page = 0, os.sysconf("SC_PAGE_SIZE")
    try:
        entries = os.scandir("/proc")
    except OSError:
        return 0
    for entry in entries:
        if not entry.name.isdigit():
            continue
        try:
            fields = Path(f"/proc/{entry.name}/stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader:
                total += int(fields[21]) * page
        except (OSError, ValueError, IndexError):
            continue
    return total


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End what is left of the group, and reap the leader."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _own_root() -> str:
    """The folder that holds the three rooms, so that the child finds them wherever they are installed."""
    return str(Path(__file__).resolve().parent.parent)


def private_folder() -> tempfile.TemporaryDirectory[str]:
    """Return a fresh folder that only this user can read."""
    return tempfile.TemporaryDirectory(prefix="gradaudit-", ignore_cleanup_errors=True)
