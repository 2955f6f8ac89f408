"""The child process of one audit: confined, limited, and ended with everything it started."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from audits.causes import Cause
from flows.sandbox import Level, Limits
from flows.sandbox.child_output import KEPT_LOG, AnswerFile, ChildOutput, PrintedEnd
from flows.sandbox.limits import excess_on_disk
from flows.sandbox.memory_group import MemoryGroup
from flows.sandbox.process_tree import ProcessTree
from flows.sandbox.standby import Standby
from flows.sandbox.starting import Conditions, StartedChild, starting
from flows.stopping import Stopped
from registry_models.child.answer import MAXIMUM_BYTES, clean

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
    standby: Standby | None = None,
) -> ChildEnd:
    """Run ``registry_models.child`` on ``request``, confined, and wait for its end.

    Past a limit everything it started is killed. Its time counts from the request on.

    Args:
        request: what the child is to do.
        folder: private folder of this run.
        limits: what it may use.
        level: how it is confined; one that this host offers.
        readable: files and folders that it may read, the artifact's above all.
        answer: file that what it answers is written into, by this process; the child knows the end of a pipe.
        extra: further paths that it may read.
        stopping: once it is set, the child and all it started are killed.
        standby: a process that was started before; used where it fits.

    Raises:
        InfrastructureError: the process cannot be started.
        Stopped: ``stopping`` was set.
    """
    conditions = Conditions.of(level, limits, device=str(request.get("device", "cpu")), extra=extra)
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        child = standby.take(conditions, readable) if standby is not None else None
        if child is None:
            child = stack.enter_context(starting(conditions, folder, readable))
        child.tell(request)
        assert child.process.stdout is not None
        printed = PrintedEnd(child.process.stdout, limits.log_bytes)
        answered = AnswerFile(child.answers, answer, min(limits.answer_bytes, MAXIMUM_BYTES))
        output = ChildOutput(printed, answered)
        try:
            cause, message = _wait(child, output, limits, began, stopping or threading.Event())
        finally:
            child.tree.end()
            child.process.wait()
            output.close()
        if cause == Cause.CRASHED and child.group is not None and child.group.ran_out:
            cause, message = Cause.MEMORY_LIMIT, _memory_text(_COUNTED, limits)
    return ChildEnd(cause, message, time.monotonic() - began, clean(printed.text, KEPT_LOG))


def _wait(
    child: StartedChild, output: ChildOutput, limits: Limits, began: float, stopping: threading.Event
) -> tuple[str | None, str]:
    process, looked, is_open = child.process, 0.0, True
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
            excess = _excess(child.tree, limits, child.group, child.folder, looked - began)
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
