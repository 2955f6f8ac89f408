"""What was found out about versions before any audit: which hold a torch model, and which are outside the audit.

One row per version looked at, in small files beside ``rows`` and ``audits``. A version never changes, so it is looked
at once; the key under which it is remembered is its owner's to change (source, registration, attached recipe), or a new
release's, whose rules are others.
"""

from __future__ import annotations

import datetime
import threading
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa

from audits.results.files import while_files_move
from audits.results.store import ResultsStore

#: The folder of the results store.
FOLDER = "kinds"

#: Small files that are merged into one.
MOST_FILES = 24

KINDS_SCHEMA = pa.schema(
    [
        pa.field(name, kind, metadata={"description": text})
        for name, kind, text in (
            (
                "key",
                pa.string(),
                "digest of the version's name, number, registration, source, recipe tag and rules",
            ),
            ("model_name", pa.string(), "registered model's name"),
            ("model_version", pa.int32(), "version number"),
            (
                "outside",
                pa.string(),
                "what puts it outside the audit, mostly a flavour's name; empty where it is inside",
            ),
            ("why", pa.string(), "the same in a sentence"),
            ("decided_at", pa.timestamp("us", tz="UTC"), "when it was looked at first, UTC"),
        )
    ],
    metadata={"schema_version": "1"},
)


@dataclass(frozen=True, slots=True)
class Kind:
    """One row; see `KINDS_SCHEMA`."""

    key: str
    model_name: str
    model_version: int
    outside: str
    why: str
    decided_at: datetime.datetime


class Kinds:
    """What is remembered of versions in a results store; read once, then only what is new.

    Args:
        store: the store.
    """

    def __init__(self, store: ResultsStore) -> None:
        self._store = store
        self._read: set[str] = set()
        self._kinds: dict[str, Kind] = {}
        self._lock = threading.Lock()

    def refresh(self) -> Kinds:
        """Read the files that appeared since the last time; return itself.

        Raises:
            InfrastructureError: the store cannot be read.
        """
        with self._lock:
            while_files_move(self._refresh)
        return self

    def _refresh(self) -> None:
        new = [name for name in self._store.names_beside(FOLDER) if name not in self._read]
        if not new:
            return
        for line in self._store.read_beside(FOLDER, new, KINDS_SCHEMA).to_pylist():
            self._take(Kind(**line))
        self._read.update(new)

    def _take(self, kind: Kind) -> None:
        """Keep the first look; one that found a version outside knew more than one that did not, an audit's process."""
        known = self._kinds.get(kind.key)
        if known is None or (not kind.outside, kind.decided_at) < (not known.outside, known.decided_at):
            self._kinds[kind.key] = kind

    def of(self, key: str) -> Kind | None:
        """Return what is remembered under a key."""
        return self._kinds.get(key)

    def remember(self, found: Iterable[Kind]) -> None:
        """Add rows, in one file; many small files become one.

        Raises:
            InfrastructureError: the store cannot be written.
        """
        kinds = list(found)
        if not kinds:
            return
        with self._lock:
            name = f"part-{uuid.uuid4().hex}.parquet"
            self._store.write_beside(FOLDER, name, _table(kinds))
            for kind in kinds:
                self._take(kind)
            self._read.add(name)
            names = self._store.names_beside(FOLDER)
            if len(names) > MOST_FILES:
                while_files_move(self._refresh)
                self._store.write_beside(FOLDER, f"merged-{uuid.uuid4().hex}.parquet", _table(self._kinds.values()))
                self._store.remove_beside(FOLDER, [one for one in names if one in self._read])


def _table(kinds: Iterable[Kind]) -> pa.Table:
    lines: Sequence[dict[str, object]] = [asdict(kind) for kind in kinds]
    return pa.Table.from_pylist(list(lines), schema=KINDS_SCHEMA)
