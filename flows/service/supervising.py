"""Processes kept running: a log file each, started again when they end, ended with everything they started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from audits.errors import InfrastructureError
from flows.processes import PYTHON, die_with_parent
from flows.sandbox.process_tree import ProcessTree

#: Seconds before an ended process is started again: doubled each time, and short again once it has run for a while.
FIRST_DELAY, LAST_DELAY, SETTLED = 1.0, 30.0, 60.0

#: A log longer than this is put aside, as NAME.log.1, when its process starts.
LOG_BYTES = 20 * 2**20


@dataclass(frozen=True)
class Service:
    """One process to keep running.

    Attributes:
        name: as in messages and in its log file's name.
        command: the program and its arguments.
        environment: its whole environment.
        patience: seconds it is given to end by itself after SIGTERM.
        serves: whether others need it to their end: it ends after them.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    patience: float = 10.0
    serves: bool = False


@dataclass
class _Running:
    service: Service
    process: subprocess.Popen[bytes]
    tree: ProcessTree
    since: float
    delay: float = FIRST_DELAY
    due: float | None = None
    left: list[ProcessTree] = field(default_factory=list)


class Supervisor:
    """Starts services, looks after them, and leaves nothing running when it ends.

    Args:
        logs: folder of the log files.
        tell: called with a sentence about what a person should know.
    """

    def __init__(self, logs: Path, tell: Callable[[str], None]) -> None:
        self._logs, self._tell = logs, tell
        self._running: list[_Running] = []
        logs.mkdir(parents=True, exist_ok=True)
        # Ends everything should this process be killed: a server's own children would outlive it otherwise.
        self._watchdog = subprocess.Popen(
            [*PYTHON, "-m", "flows.service.watchdog"], stdin=subprocess.PIPE, start_new_session=True
        )

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def log_of(self, service: Service) -> Path:
        """Return the file that a service writes to."""
        return self._logs / f"{service.name}.log"

    def start(self, service: Service) -> None:
        """Start a service and keep it running from now on."""
        log = self.log_of(service)
        if log.is_file() and log.stat().st_size > LOG_BYTES:
            log.replace(log.with_suffix(".log.1"))
        process = self._launch(service)
        self._running.append(_Running(service, process, ProcessTree(process.pid), time.monotonic()))

    def wait_for(self, service: Service, answers: Callable[[], bool], seconds: float, stop: Callable[[], bool]) -> None:
        """Wait until a service answers, or until ``stop``.

        Raises:
            InfrastructureError: it ended, or did not answer in time; the text has its last words.
        """
        deadline = time.monotonic() + seconds
        running = next(one for one in self._running if one.service is service)
        while not stop():
            if running.process.poll() is not None:
                raise InfrastructureError(f"{service.name} ended at once: {self._last_words(service)}")
            if answers():
                return
            if time.monotonic() > deadline:
                words = self._last_words(service)
                raise InfrastructureError(f"{service.name} did not answer within {seconds:.0f} s: {words}")
            time.sleep(0.1)

    def look(self) -> None:
        """Notice what has ended and start it again when its time has come."""
        now = time.monotonic()
        for one in self._running:
            one.tree.look()
            one.left = [tree for tree in one.left if tree.look().tasks]
            if one.due is None and (code := one.process.poll()) is not None:
                if now - one.since > SETTLED:
                    one.delay = FIRST_DELAY
                how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                self._tell(
                    f"{one.service.name} ended ({how}), started again in {one.delay:.0f} s; "
                    f"its log: {self.log_of(one.service)}"
                )
                one.due, one.delay = now + one.delay, min(2 * one.delay, LAST_DELAY)
            elif one.due is not None and now >= one.due:
                one.left.append(one.tree)  # what it had started may still be at work; it ends with us
                one.process = self._launch(one.service)
                one.tree, one.since, one.due = ProcessTree(one.process.pid), now, None

    def replace(self, name: str, why: str) -> None:
        """Kill a process that is alive and does nothing; it is started again, and what it had started goes on."""
        for one in self._running:
            if one.service.name == name and one.process.poll() is None:
                self._tell(f"{name}: {why}")
                one.process.kill()

    def stop(self) -> None:
        """End every service and everything it started: those that use the servers first, all at once."""
        for serves in (False, True):
            wave = [one for one in self._running if one.service.serves is serves]
            for one in wave:
                one.tree.look()
                if one.process.poll() is None:
                    one.process.terminate()
            deadline = time.monotonic() + max((one.service.patience for one in wave), default=0.0)
            for one in wave:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    one.process.wait(max(0.0, deadline - time.monotonic()))
                for tree in (one.tree, *one.left):
                    tree.end()
                one.process.wait()
        self._running = []
        assert self._watchdog.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._watchdog.stdin.close()
        self._watchdog.wait()

    def _launch(self, service: Service) -> subprocess.Popen[bytes]:
        parent = os.getpid()
        with self.log_of(service).open("ab") as log:
            process = subprocess.Popen(
                list(service.command),
                env=dict(service.environment),
                cwd=self._logs.parent,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a Ctrl-C in the terminal reaches us alone
                preexec_fn=lambda: die_with_parent(parent),
            )
        assert self._watchdog.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._watchdog.stdin.write(f"{process.pid}\n".encode())
            self._watchdog.stdin.flush()
        return process

    def _last_words(self, service: Service) -> str:
        lines = self.log_of(service).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"{lines[-1] if lines else 'it said nothing'} (all of it: {self.log_of(service)})"
