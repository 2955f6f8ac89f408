"""Which audits are committed, read incrementally: what a sweep asks before it judges what is due.

A day's files are small and many until they are compacted, and a loop asks every few seconds. So files are read once,
and of every version only its latest audits are kept in memory.
"""

from __future__ import annotations

import datetime
import os
import threading
from dataclasses import dataclass, fields

import pyarrow as pa

from audits.causes import Cause
from audits.results.files import StoreFile, while_files_move
from audits.results.store import ResultsStore

#: Audits remembered per version: the latest, the one before it, and one more for two occasions on one night.
KEPT = 3


@dataclass(frozen=True, slots=True)
class CommittedAudit:
    """One line of ``results/audits``, as much of it as a sweep needs; see ``docs/reference/result_format.md``."""

    audit_id: str
    audited_at: datetime.datetime
    model_name: str
    model_version: int
    artifact_kind: str
    device: str
    outcome: str
    coverage: float
    seconds: float
    run_id: str
    due_key: str
    environment: str
    occasion: str
    message: str
    waivers: tuple[str, ...] = ()
    unjudged: str = ""


_COLUMNS = [field.name for field in fields(CommittedAudit)]


class CommittedAudits:
    """The latest committed audits of every version in a results store.

    Args:
        store: the store; `refresh` reads what is new in it.
    """

    def __init__(self, store: ResultsStore) -> None:
        self._store = store
        self._read: set[tuple[str, int]] = set()
        self._audits: dict[tuple[str, int], list[CommittedAudit]] = {}
        self._without_recipe: dict[tuple[str, int], datetime.datetime] = {}
        self._lock = threading.Lock()

    def refresh(self) -> CommittedAudits:
        """Read the files that appeared since the last time; return itself.

        Raises:
            InfrastructureError: the store cannot be read.
        """
        with self._lock:
            while_files_move(self._refresh)
        return self

    def _refresh(self) -> None:
        present = {_version_of(file, self._store): file for file in self._store.files("audits")}
        if self._read - present.keys():  # compacted, rewritten or deleted: what is left is the truth
            self._read, self._audits, self._without_recipe = set(), {}, {}
        new = [file for key, file in present.items() if key not in self._read]
        if new:
            self._take(self._store.read("audits", columns=_COLUMNS, files=sorted(new)))
            self._read |= present.keys()

    def of(self, name: str, version: int) -> list[CommittedAudit]:
        """Return a version's latest audits, oldest first."""
        return self._audits.get((name, version), [])

    def without_recipe_since(self, name: str, version: int) -> datetime.datetime | None:
        """Return when an audit first found a version without a recipe; None where none did."""
        return self._without_recipe.get((name, version))

    def latest(self) -> list[CommittedAudit]:
        """Return the latest audit of every version."""
        return [audits[-1] for audits in self._audits.values()]

    @property
    def ids(self) -> frozenset[str]:
        """The ids of the audits that are remembered."""
        return frozenset(audit.audit_id for audits in self._audits.values() for audit in audits)

    def _take(self, table: pa.Table) -> None:
        frame = table.to_pandas().sort_values("audited_at", kind="stable")
        frame = frame[frame["model_version"].notna()]
        for line in frame[frame["unjudged"] == Cause.NO_RECIPE].itertuples(index=False):
            key, at = (str(line.model_name), int(line.model_version)), line.audited_at.to_pydatetime()
            self._without_recipe[key] = min(at, self._without_recipe.get(key, at))
        frame = frame.groupby(["model_name", "model_version"]).tail(KEPT)
        for line in frame.itertuples(index=False):
            values = {name: getattr(line, name) for name in _COLUMNS}
            values["model_version"] = int(values["model_version"])
            values["audited_at"] = values["audited_at"].to_pydatetime()
            values |= {name: values[name] or "" for name in ("environment", "run_id", "message", "device", "unjudged")}
            values["waivers"] = tuple(() if values["waivers"] is None else values["waivers"])
            audit = CommittedAudit(**values)
            known = self._audits.setdefault((audit.model_name, audit.model_version), [])
            others = [a for a in known if a.audit_id != audit.audit_id]
            known[:] = sorted([*others, audit], key=lambda a: a.audited_at)[-KEPT:]


def _version_of(file: StoreFile, store: ResultsStore) -> tuple[str, int]:
    """A file's name and, where one audit's file can be overwritten unnoticed, its time of change."""
    local = store.local_folder is not None and file.audit_id is not None
    return file.path, os.stat(file.path).st_mtime_ns if local else 0
