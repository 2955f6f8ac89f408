"""The child process of one audit: confined, limited, and ended with everything it started."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from audits.causes import Cause
from audits.errors import InfrastructureError
from flows.choosing.sweeping import Stopped
from flows.processes import die_with_parent
from flows.sandbox import Confinement, Level, Limits, confine
from flows.sandbox.child_output import KEPT_LOG, AnswerFile, ChildOutput, PrintedEnd
from flows.sandbox.limits import excess_on_disk, machine_memory
from flows.sandbox.memory_group import MemoryGroup, memory_group
from flows.sandbox.process_tree import ProcessTree
from flows.sandbox.removing import remove_tree
from flows.settings.environment import GradauditSettings
from registry_models.child.answer import MAXIMUM_BYTES, clean

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

#: How often a running child's use is looked at, in seconds.
_POLL = 0.1
_GIB, _MIB = 2**30, 2**20

#: How a message names memory that the kernel has counted.
_COUNTED = "what the kernel counts"


@dataclass(frozen=True)
class ChildEnd:
    """How a child ended.

    Attributes:
        cause: None when it came to its own end with exit code 0.
        message: the cause as a sentence.
        seconds: how long it ran.
        log: the end of what it printed, without control characters.
    """

    cause: str | None
    message: str
    seconds: float
    log: str


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


def run_child(
    request: dict[str, Any],
    folder: Path,
    limits: Limits,
    *,
    level: Level = Level.PROCESS,
    readable: Sequence[Path] = (),
    answer: Path | None = None,
    extra: Iterable[str] = (),
    stopping: threading.Event | None = None,
) -> ChildEnd:
    """Run ``registry_models.child`` on ``request``, confined, and wait for its end.

    The child has a session of its own, a private home and temporary folder, no variable but a few harmless ones, and
    no descriptor of its parent's. Past a limit everything it started is killed.

    Args:
        request: what the child is to do.
        folder: private folder of this run.
        limits: what it may use.
        level: how it is confined; one that this host offers.
        readable: files and folders that it may read, the artifact's above all.
        answer: file that what it answers is written into, by this process; the child knows the end of a pipe.
        extra: further paths that it may read.
        stopping: once it is set, the child and all it started are killed.

    Raises:
        InfrastructureError: the process cannot be started.
        Stopped: ``stopping`` was set.
    """
    reading, writing = os.pipe()
    with (
        os.fdopen(reading, "rb", buffering=0) as pipe,
        os.fdopen(writing, "wb", buffering=0) as its_end,
        memory_group(limits) as group,
    ):
        request_file = folder / "request.json"
        request_file.write_text(json.dumps({**request, "answer": writing}), encoding="utf-8")
        request_file.chmod(0o644)
        began = time.monotonic()
        confinement = confine(
            level,
            limits,
            folder=folder,
            readable=[request_file, *readable],
            device=str(request.get("device", "cpu")),
            own_root=_own_root(),
            extra=extra,
        )
        (folder / "home").mkdir()
        process = _started(confinement, request_file, folder / "home", its_end, group)
        assert process.stdout is not None
        printed = PrintedEnd(process.stdout, limits.log_bytes)
        answered = AnswerFile(pipe, answer, min(limits.answer_bytes, MAXIMUM_BYTES))
        tree, output = ProcessTree(process.pid), ChildOutput(printed, answered)
        try:
            cause, message = _wait(process, tree, output, limits, group, folder, began, stopping or threading.Event())
        finally:
            tree.end()
            process.wait()
            output.close()
            remove_tree(folder / "home")
        if cause == Cause.CRASHED and group is not None and group.ran_out:
            cause, message = Cause.MEMORY_LIMIT, _memory_text(_COUNTED, limits)
    return ChildEnd(cause, message, time.monotonic() - began, clean(printed.text, KEPT_LOG))


def _started(
    confinement: Confinement, request: Path, home: Path, its_end: IO[bytes], group: MemoryGroup | None
) -> subprocess.Popen[bytes]:
    """Start the child, which then holds the only writing end of the pipe.

    Raises:
        InfrastructureError: the process cannot be started.
    """
    parent = os.getpid()

    def before() -> None:
        die_with_parent(parent)
        if group is not None:
            group.enter()

    try:
        return subprocess.Popen(
            [*confinement.command, sys.executable, "-m", "registry_models.child", str(request)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=_environment(confinement),
            cwd=home,
            close_fds=True,
            pass_fds=(its_end.fileno(),),
            start_new_session=True,
            preexec_fn=before,
        )
    except OSError as error:
        raise InfrastructureError(f"an audit's process could not be started: {error}") from error
    finally:
        its_end.close()


def _environment(confinement: Confinement) -> dict[str, str]:
    environment = {name: os.environ[name] for name in _PASSED if name in os.environ}
    return environment | {
        "HOME": confinement.home,
        "TMPDIR": confinement.home,
        "USER": confinement.user_name,
        "LOGNAME": confinement.user_name,
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",
        # Threads that spin while they wait starve every other audit on the machine: two audits of a small model on
        # two cores took 75 s each, with this 2.7 s.
        "OMP_WAIT_POLICY": "PASSIVE",
        # cuBLAS has deterministic algorithms only with a workspace of a fixed size, told before it starts.
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        # Torch asks for huge pages: a gradient check of 124 M parameters takes 11.2 s instead of 13.0 s.
        "THP_MEM_ALLOC_ENABLE": "1",
        "PYTHONPATH": str(_own_root()),
        "MPLBACKEND": "Agg",
    }


def _wait(
    process: subprocess.Popen[bytes],
    tree: ProcessTree,
    output: ChildOutput,
    limits: Limits,
    group: MemoryGroup | None,
    folder: Path,
    began: float,
    stopping: threading.Event,
) -> tuple[str | None, str]:
    looked, is_open = 0.0, True
    while process.poll() is None:
        if stopping.is_set():
            raise Stopped
        if is_open:
            is_open = output.read_for(_POLL)
        else:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_POLL)
        if output.printed.excessive:
            return Cause.OUTPUT_LIMIT, (
                f"the audit was ended after printing {limits.log_bytes / _MIB:.0f} MiB, its output limit "
                "(GRADAUDIT_LOG_LIMIT, in GiB)"
            )
        if output.answered.excessive:
            return Cause.ANSWER_LIMIT, (
                f"the audit was ended after answering with {output.answered.limit / _MIB:.0f} MiB, the most that an "
                "answer may have"
            )
        if time.monotonic() - looked >= _POLL and process.poll() is None:
            looked = time.monotonic()
            excess = _excess(tree, limits, group, folder, looked - began)
            if excess is not None:
                return excess
    return _ending(process.returncode)


def _excess(
    tree: ProcessTree, limits: Limits, group: MemoryGroup | None, folder: Path, seconds: float
) -> tuple[str, str] | None:
    """Return what is past its limit, or None."""
    if seconds > limits.seconds:
        return Cause.TIME_LIMIT, (
            f"the audit was ended after {limits.seconds:.0f} s, its time limit: does the model hang? "
            "GRADAUDIT_TIME_LIMIT gives it more seconds"
        )
    usage = tree.look()
    # First, because many small processes are also much memory; a few of ours stand around the child's.
    if usage.tasks > limits.tasks + 8:
        return Cause.PROCESS_LIMIT, (
            f"the audit was ended at {usage.tasks} processes and threads, its limit is {limits.tasks} "
            "(GRADAUDIT_PROCESS_LIMIT)"
        )
    if usage.memory_bytes > limits.memory_bytes:
        return Cause.MEMORY_LIMIT, _memory_text(f"{usage.memory_bytes / _GIB:.1f} GiB", limits)
    if group is not None and group.ran_out:  # the kernel has ended one of its processes, and others go on without it
        return Cause.MEMORY_LIMIT, _memory_text(_COUNTED, limits)
    disk = excess_on_disk(folder, limits, usage.nameless_bytes)
    if disk is not None:
        return Cause.DISK_LIMIT, (
            f"the audit was ended after leaving {disk} on disk; it may leave {limits.answer_bytes / _MIB:.0f} MiB "
            "(GRADAUDIT_ANSWER_LIMIT, in GiB)"
        )
    return None


def _memory_text(used: str, limits: Limits) -> str:
    return (
        f"the audit was ended at {used}, its memory limit ({limits.memory_bytes / _GIB:.1f} GiB): "
        "GRADAUDIT_MEMORY_LIMIT raises it, in GiB, where the machine has more"
    )


def _ending(code: int) -> tuple[str | None, str]:
    if code == 0:
        return None, ""
    # A program that waits for another in a namespace reports its signal as 128 and the number.
    number = -code if code < 0 else code - 128
    try:
        name = signal.Signals(number).name if number > 0 else None
    except ValueError:
        name = None
    if name is None:
        return Cause.CRASHED, f"the audit's process ended with exit code {code} and gave no answer"
    if name == "SIGXCPU":
        return Cause.TIME_LIMIT, "the audit used up its CPU time: GRADAUDIT_CPU_LIMIT gives it more seconds"
    return Cause.CRASHED, f"the audit's process was ended by {name}: the model's code or a native kernel crashed"


def _own_root() -> Path:
    """The folder that holds the three rooms, so that the child finds them wherever they are installed."""
    return Path(__file__).resolve().parents[2]
