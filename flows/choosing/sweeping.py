"""What the audits of one flow run share: one child at a time, one writer, room on the disk, an end for all of them.

Two versions are under way at a time: while one is audited, the next is downloaded or the last one published.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from mlflow.tracking import MlflowClient

from audits.errors import InfrastructureError
from audits.results.committed import CommittedAudit, CommittedAudits
from audits.results.store import ResultsStore
from flows.choosing.due_keys import digest, environment
from flows.settings.environment import GradauditSettings
from flows.stopping import Stopped as Stopped
from registry_models.registry.versions import Version, answers

#: Versions under way at a time: one in its audit, one before or after it.
UNDER_WAY = 2

#: The occasion of a version that was just registered: any result of it as it is will do.
REGISTRATION = "registration"

#: An audit counts as done since the versions were chosen though it ended this long before: it may have been waiting
#: for MLflow while they were.
PUBLISHING = datetime.timedelta(minutes=10)

#: Failures of services in a row after which the rest of a sweep is not tried: the next one will.
GIVE_UP_AFTER = 3

#: Seconds between looks at a lock or at the end of a sweep.
_POLL = 0.05

_GIB = 2**30


class NotTriedError(InfrastructureError):
    """A version that was not tried, because services had failed several times before it."""


class DiskBudget:
    """Bytes of downloads on disk at a time; one download always fits."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used, self._changed = limit, 0, threading.Condition()

    @contextlib.contextmanager
    def for_bytes(self, size: int, stopping: threading.Event) -> Iterator[None]:
        """Wait until ``size`` bytes fit beside what is there, and count them inside the block."""
        with self._changed:
            while self._used and self._used + size > self._limit:
                _check(stopping)
                self._changed.wait(_POLL)
            self._used += max(size, 1)
        try:
            yield
        finally:
            with self._changed:
                self._used -= max(size, 1)
                self._changed.notify_all()


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What the audits of one flow run share.

    Attributes:
        settings: the settings.
        client: client of the registry.
        occasion: why the versions are audited.
        chosen_at: when they were chosen; a result committed since then is not repeated.
    """

    settings: GradauditSettings
    client: MlflowClient
    occasion: str
    chosen_at: datetime.datetime | None
    stopping: threading.Event = dataclasses.field(default_factory=threading.Event)
    auditing: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    keeping: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    failures: dict[str, str] = dataclasses.field(default_factory=dict)
    committed: CommittedAudits = dataclasses.field(init=False)
    disk_budget: DiskBudget = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "committed", CommittedAudits(ResultsStore(self.settings.results)))
        object.__setattr__(self, "disk_budget", DiskBudget(int(self.settings.ahead_limit * _GIB)))

    @contextlib.contextmanager
    def counting_failures(self, label: str) -> Iterator[None]:
        """Count the versions in a row for which a service failed; one that is audited begins anew.

        Raises:
            NotTriedError: several have failed, and the registry does not answer at all.
        """
        _check(self.stopping)
        if len(self.failures) >= GIVE_UP_AFTER and label not in self.failures and not answers(self.client):
            raise NotTriedError(f"not tried, since the registry does not answer: {next(iter(self.failures.values()))}")
        try:
            yield
        except InfrastructureError as error:
            self.failures[label] = str(error)
            raise
        self.failures.clear()

    @contextlib.contextmanager
    def claim(self, version: Version, key: str) -> Iterator[CommittedAudit | None]:
        """Hold a version against every other sweep on this results store, and yield what made its audit needless.

        On an object store there is no lock: there, the result is looked for again, and of two runs of one audit the
        older is superseded.
        """
        with self._version_lock(version):
            yield self._result_since(version, key)

    def _result_since(self, version: Version, key: str) -> CommittedAudit | None:
        for audit in reversed(self.committed.refresh().of(version.name, version.version)):
            if audit.due_key != key or audit.environment != environment(self.settings):
                continue
            since = self.chosen_at is not None and audit.audited_at >= self.chosen_at - PUBLISHING
            if since or audit.occasion == self.occasion or self.occasion == REGISTRATION:
                return audit
        return None

    def _version_lock(self, version: Version) -> contextlib.AbstractContextManager[None]:
        folder = ResultsStore(self.settings.results).local_folder
        if folder is None:
            return contextlib.nullcontext()
        name = digest(version.name, version.version)
        return waiting_for(folder / ".claims" / f"{name}.lock", self.stopping)

    @contextlib.contextmanager
    def alone(self, lock: threading.Lock) -> Iterator[None]:
        """Hold one of the sweep's own locks inside the block; a stopped sweep stops waiting."""
        while not lock.acquire(timeout=1.0):
            _check(self.stopping)
        try:
            yield
        finally:
            lock.release()


@contextlib.contextmanager
def waiting_for(path: Path, stopping: threading.Event) -> Iterator[None]:
    """Hold the file lock ``path`` inside the block; a stopped sweep stops waiting.

    Raises:
        InfrastructureError: the lock's file cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=1.0, poll_interval=_POLL, mode=0o666)
        while True:
            _check(stopping)
            with contextlib.suppress(Timeout):
                lock.acquire()
                break
    except OSError as error:
        raise InfrastructureError(f"the lock {path} cannot be used: {error}") from error
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def ending(stopping: threading.Event) -> Iterator[None]:
    """Set ``stopping`` when the block ends by an exception, an interrupt included."""
    try:
        yield
    except BaseException:
        stopping.set()
        raise


def _check(stopping: threading.Event) -> None:
    if stopping.is_set():
        raise Stopped


def state_folder(settings: GradauditSettings) -> Path:
    """Return this host's and user's folder of GPU locks and canary stamps, made private.

    Raises:
        InfrastructureError: it cannot be made, or is somebody else's.
    """
    chosen = settings.state or Path(tempfile.gettempdir()) / f"gradaudit-{os.getuid()}"
    folder = Path(chosen)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = folder.stat().st_uid
    except OSError as error:
        raise InfrastructureError(f"the folder {folder} for locks cannot be used: {error}") from error
    if owner != os.getuid():
        raise InfrastructureError(f"the folder {folder} for locks is another user's: set GRADAUDIT_STATE")
    return folder
