"""Whether a version may go on: the audit of exactly this version, as it is now, in this environment; found or made."""

from __future__ import annotations

import dataclasses
import datetime
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlflow.tracking import MlflowClient

from audits.errors import InfrastructureError, InputError
from audits.history.reading import committed_audits, stored_report
from audits.report import AuditReport
from audits.results.store import ResultsStore
from flows.choosing.due import is_present
from flows.choosing.due_keys import due_key, environment
from flows.choosing.sweeping import REGISTRATION, Stopped, Sweep
from flows.one_audit.one_version import Target, audit_version, fresh_occasion
from flows.settings.environment import GradauditSettings
from registry_models.registry.versions import Version

#: Seconds between looks at the results store for an audit that others make.
_LOOK = 2.0


@dataclasses.dataclass(frozen=True)
class Believed:
    """The audit that a gate believes.

    Attributes:
        report: the audit.
        made: whether the gate made it.
    """

    report: AuditReport
    made: bool


def believed_audit(
    version: Version,
    client: MlflowClient,
    settings: GradauditSettings,
    *,
    max_age: datetime.timedelta | None,
    timeout: float,
    make: bool,
    on_waiting: Callable[[], None] = lambda: None,
) -> Believed | None:
    """Return the newest audit of the version as it is now and in this environment; make one where there is none.

    An audit of the version that a sweep is at is awaited, not made a second time.

    Args:
        version: what the gate is about; an alias has been resolved, once.
        client: client of the registry.
        settings: results store, limits.
        max_age: an older audit is not believed.
        timeout: seconds to wait for one that others make.
        make: False believes what there is, or comes within the timeout.
        on_waiting: called once when another sweep has held the version for some seconds.

    Returns:
        The audit; None when there is none and none was to be made.

    Raises:
        InfrastructureError: the registry, the results store or MLflow does not answer, or another sweep has held the
            version for longer than the timeout.
    """
    lookup = Lookup(version, settings, max_age)
    deadline = time.monotonic() + timeout
    while True:
        if (report := lookup.newest()) is not None:
            return Believed(report, made=False)
        if make or time.monotonic() >= deadline:
            break
        time.sleep(min(_LOOK, max(0.0, deadline - time.monotonic())))
    return _awaited_or_made(version, client, settings, lookup, timeout, on_waiting) if make else None


def _awaited_or_made(
    version: Version,
    client: MlflowClient,
    settings: GradauditSettings,
    lookup: Lookup,
    timeout: float,
    on_waiting: Callable[[], None],
) -> Believed:
    waiting = Sweep(settings, client, REGISTRATION, None)
    timers = [threading.Timer(timeout, waiting.stopping.set), threading.Timer(_LOOK, on_waiting)]
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        with waiting.claim(version, lookup.key):
            timers[1].cancel()
            if (report := lookup.newest()) is not None:
                return Believed(report, made=False)
            target = Target(version, fresh_occasion())
            return Believed(audit_version(target, client, settings), made=True)
    except Stopped as stopped:
        raise InfrastructureError(f"another audit of {version.label} has not ended within {timeout:g} s") from stopped
    finally:
        for timer in timers:
            timer.cancel()


class Lookup:
    """The stored audits that are about a version as it is now.

    Attributes:
        key: digest of what the version's owner can change.
        environment: what the audit that `newest` found ran with.
    """

    def __init__(self, version: Version, settings: GradauditSettings, max_age: datetime.timedelta | None) -> None:
        self._version, self._max_age = version, max_age
        self._store, self._present = ResultsStore(settings.results), environment(settings)
        self.environment = self._present
        self.key = due_key(version, settings, settings.for_model(version.name))

    def newest(self) -> AuditReport | None:
        """Return the newest of them, whatever it says; None when there is none that is young enough.

        Raises:
            InputError: the results store is a file.
        """
        folder = self._store.local_folder
        if folder is not None and Path(folder).is_file():
            raise InputError(f"the results store {folder}: a file stands where a folder must be: name another folder")
        if folder is not None and not Path(folder).is_dir():
            return None
        lines = committed_audits(self._store, self._version.name)
        line = next((line for line in lines if self._counts(line)), None)
        if line is None:
            return None
        self.environment = str(line["environment"])
        return stored_report(self._store, line)

    def _counts(self, line: dict[str, Any]) -> bool:
        return (
            line["model_version"] == self._version.version
            and line["due_key"] == self.key
            and is_present(line["environment"] or "", self._present)
            and (self._max_age is None or datetime.datetime.now(datetime.UTC) - line["audited_at"] <= self._max_age)
        )
