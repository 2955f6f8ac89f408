"""The result format: the Arrow schemas of rows and audits, and the store they are written to and read from.

Layout, under one root (a folder or an object-store URI):

```
rows/audit_date=2026-01-31/part-<audit_id>.parquet     one row per audit, phase, step, lane, check and parameter
audits/audit_date=2026-01-31/part-<audit_id>.parquet   one row per audit, written last: the audit's commit
```

`audits.compaction` merges a day's files into ``merged-...``, and a month's into the folder ``audit_date=2026-01``.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow import fs

from audits.errors import InfrastructureError, SettingsError
from audits.outcomes import ResultRow
from audits.store_files import StoreFile, list_files, while_files_move

if TYPE_CHECKING:
    import pandas as pd

#: Version of the result format. Columns are only ever added; a changed meaning needs a new number.
SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditIdentity:
    """Which audit a row belongs to: the columns all rows of one audit share."""

    audit_id: str = ""
    audited_at: datetime.datetime = dataclasses.field(default_factory=lambda: datetime.datetime.now(datetime.UTC))
    model_name: str = ""
    model_version: int | None = None
    model_digest: str = ""
    recipe_digest: str = ""
    settings_digest: str = ""
    torch: str = ""
    device: str = ""
    driver: str = ""
    artifact_kind: str = "live"
    isolation: str = "in-process"


def _field(name: str, kind: pa.DataType, text: str) -> pa.Field:
    return pa.field(name, kind, metadata={"description": text})


_STRING, _FLOAT = pa.string(), pa.float64()
_STRINGS, _MAP = pa.list_(pa.string()), pa.map_(pa.string(), pa.string())

IDENTITY_FIELDS = (
    _field("audit_id", _STRING, "digest of fingerprint and occasion; a retry has the same, a re-audit another"),
    _field("audited_at", pa.timestamp("us", tz="UTC"), "when the audit ended, UTC"),
    _field("model_name", _STRING, "registered model's name"),
    _field("model_version", pa.int32(), "version number; null for a local directory"),
    _field("model_digest", _STRING, "digest of the version's files"),
    _field("recipe_digest", _STRING, "digest of the recipe, its tensors included"),
    _field("settings_digest", _STRING, "digest of the audit's settings"),
    _field("torch", _STRING, "torch's version"),
    _field("device", _STRING, "device the audit ran on: cpu, or the GPU's name"),
    _field("driver", _STRING, "CUDA version torch was built for; empty on CPU"),
    _field("artifact_kind", _STRING, "eager, pickle, exported, transformers, lightning; live for a model in process"),
    _field("isolation", _STRING, "how the audit's process was confined"),
)
ROW_FIELDS = (
    _field("row", pa.int32(), "position of the row within its audit, from 0"),
    _field("check", _STRING, "the check's name, as `gradaudit checks` lists them"),
    _field("outcome", _STRING, "pass, warn, fail, inconclusive or skipped"),
    _field("severity", _STRING, "what a failure does to the version: fail or warn"),
    _field("phase", _STRING, "phase of the training step; null for the whole model"),
    _field("step", pa.int16(), "training step, from 1; null where steps do not matter"),
    _field("lane", _STRING, "native, float64, float32 or synthetic"),
    _field("parameter", _STRING, "canonical parameter name; null for the whole model or phase"),
    _field("module", _STRING, "class and path of the module that holds the parameter"),
    _field("numel", pa.int64(), "number of elements of the parameter"),
    _field("dtype", _STRING, "the parameter's dtype in the native lane"),
    _field("measured", _FLOAT, "the number the check measured; its unit is the check's"),
    _field("expected", _FLOAT, "the number it was compared with, same unit"),
    _field("error", _FLOAT, "the deviation that was judged; same unit as threshold"),
    _field("threshold", _FLOAT, "largest error that passes"),
    _field("detection_limit", _FLOAT, "smallest relative error this row would have found"),
    _field("parameter_norm", _FLOAT, "Euclidean norm of the parameter"),
    _field("gradient_norm", _FLOAT, "Euclidean norm of its gradient"),
    _field("update_norm", _FLOAT, "Euclidean norm of its change in the step"),
    _field("seed", pa.int64(), "seed of the random draws behind the row"),
    _field("cause", _STRING, "short machine-readable reason, such as 'canonical step' or 'unresolved'"),
    _field("message", _STRING, "one sentence for a person"),
    _field("where_to_look", _STRING, "advice on a finding"),
    _field("waiver", _STRING, "reason, owner and end of the waiver that excuses the finding; it then only warns"),
)
ROWS_SCHEMA = pa.schema([*IDENTITY_FIELDS, *ROW_FIELDS], metadata={"schema_version": str(SCHEMA_VERSION)})
#: What an audit's child process answers with: rows without identity, which its parent adds.
ANSWER_SCHEMA = pa.schema(ROW_FIELDS, metadata={"schema_version": str(SCHEMA_VERSION)})
AUDITS_SCHEMA = pa.schema(
    [
        *IDENTITY_FIELDS,
        _field("outcome", _STRING, "the version's outcome"),
        _field("coverage", _FLOAT, "share of trainable tensors whose gradient and update were resolved, 0 to 1"),
        _field("coverage_elements", _FLOAT, "the same share by elements"),
        _field("n_pass", pa.int32(), "rows that passed"),
        _field("n_warn", pa.int32(), "rows that warned"),
        _field("n_fail", pa.int32(), "rows that failed"),
        _field("n_inconclusive", pa.int32(), "rows that could not tell"),
        _field("n_skipped", pa.int32(), "rows that were skipped, with their reason"),
        _field("seconds", _FLOAT, "duration of the audit's own work"),
        _field("run_id", _STRING, "MLflow run that holds the report"),
        _field("fingerprint", _STRING, "digest of everything the verdict depends on"),
        _field("due_key", _STRING, "digest that tells without a download whether a version has changed"),
        _field("environment", _STRING, "gradaudit, torch, device setting and driver that the audit ran with"),
        _field("occasion", _STRING, "why it was audited: registration, a night's date, or a forced run's id"),
        _field("message", _STRING, "the verdict in one sentence"),
        _field("parts", _MAP, "digest of each part the verdict depends on: weights, files, sources, loss, ..."),
        _field("provenance", _MAP, "recipe field, and who declared it or that it is assumed"),
        _field("limits", _STRINGS, "sentences on what this audit could not see"),
        _field("unresolved", _STRINGS, "trainable parameters whose gradient or update was not resolved"),
        _field("waivers", _STRINGS, "ids of the waivers that excuse a finding of this audit"),
    ],
    metadata={"schema_version": str(SCHEMA_VERSION)},
)


def answer_table(rows: Sequence[ResultRow]) -> pa.Table:
    """Return the rows as a table of `ANSWER_SCHEMA`."""
    names = [field.name for field in dataclasses.fields(ResultRow)]
    columns: dict[str, list[Any]] = {name: [getattr(row, name) for row in rows] for name in names}
    columns["row"] = list(range(len(rows)))
    for name in ("outcome", "severity", "lane"):
        columns[name] = [None if value is None else str(value) for value in columns[name]]
    return pa.table({field.name: pa.array(columns[field.name], field.type) for field in ROW_FIELDS}, ANSWER_SCHEMA)


def rows_table(answer: pa.Table, identity: AuditIdentity) -> pa.Table:
    """Add the identity columns to an answer: a table of `ROWS_SCHEMA`."""
    columns = [pa.repeat(pa.scalar(getattr(identity, f.name), f.type), answer.num_rows) for f in IDENTITY_FIELDS]
    return pa.table([*columns, *(answer.column(f.name) for f in ROW_FIELDS)], schema=ROWS_SCHEMA)


def audits_table(identity: AuditIdentity, **values: Any) -> pa.Table:
    """Return one audit's line as a table of `AUDITS_SCHEMA`."""
    line = {f.name: getattr(identity, f.name) for f in IDENTITY_FIELDS} | {"environment": ""} | values
    return pa.table({f.name: pa.array([_plain(line, f)], f.type) for f in AUDITS_SCHEMA}, schema=AUDITS_SCHEMA)


def _plain(line: Mapping[str, Any], field: pa.Field) -> Any:
    """A value as Arrow takes it: mappings as pairs; only lists and maps may be left out."""
    value = line.get(field.name) if pa.types.is_nested(field.type) else line[field.name]
    return list(value.items()) if isinstance(value, Mapping) else list(value) if isinstance(value, tuple) else value


class ResultsStore:
    """Two Parquet datasets, ``rows`` and ``audits``, under one root.

    Args:
        root: a local folder, or a URI that `pyarrow.fs` knows (``s3://``, ``gs://``, ``abfs://``).

    Raises:
        SettingsError: a URI that cannot be.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = str(root)
        if "://" in self.root:
            try:
                self._filesystem, self._path = fs.FileSystem.from_uri(self.root)
            except (OSError, ValueError) as error:
                raise SettingsError(f"the results store {self.root!r} cannot be opened: {error}") from error
        else:
            self._filesystem, self._path = fs.LocalFileSystem(), os.path.abspath(self.root)

    @property
    def local_folder(self) -> Path | None:
        """The store's folder; None for an object store."""
        return Path(self._path) if isinstance(self._filesystem, fs.LocalFileSystem) else None

    def write(self, dataset: str, table: pa.Table, *, date: datetime.date, audit_id: str) -> str:
        """Write one audit's file whole; readers see all of it or nothing. A repeat replaces it.

        Raises:
            InfrastructureError: the disk or the object store refused.
        """
        folder = f"{self._path}/{dataset}/audit_date={date.isoformat()}"
        target = f"{folder}/part-{audit_id}.parquet"
        try:
            if isinstance(self._filesystem, fs.LocalFileSystem):
                write_atomically(table, Path(target))
            else:
                with self._filesystem.open_output_stream(target) as stream:
                    write_parquet(table, stream)
        except OSError as error:
            raise InfrastructureError(f"results could not be written to {target}: {error}") from error
        return target

    def files(
        self, dataset: str, *, since: datetime.date | None = None, until: datetime.date | None = None
    ) -> list[StoreFile]:
        """Return the dataset's files, in order of their names.

        Args:
            dataset: ``rows`` or ``audits``.
            since: leave out folders of earlier days.
            until: leave out folders of later days.

        Raises:
            InfrastructureError: the store cannot be listed.
        """
        return list_files(self._filesystem, f"{self._path}/{dataset}", since=since, until=until)

    def read(
        self,
        dataset: str,
        *,
        columns: Sequence[str] | None = None,
        filter: Any = None,
        files: Sequence[StoreFile] | None = None,
    ) -> pa.Table:
        """Read a dataset; of several files of one audit id the newest counts.

        Args:
            dataset: ``rows`` or ``audits``.
            columns: their names; all without.
            filter: a `pyarrow.dataset` expression over columns that all rows of one audit share. Any other could take
                the newest writing's rows away and leave an older one's; `audits.queries` has no such limit.
            files: only these of `files`; all without.

        Raises:
            InfrastructureError: the store cannot be read.
        """
        schema = ROWS_SCHEMA if dataset == "rows" else AUDITS_SCHEMA
        if files is None:
            return while_files_move(
                lambda: self.read(dataset, columns=columns, filter=filter, files=self.files(dataset))
            )
        if not files:
            empty = schema.empty_table()
            return empty if columns is None else empty.select(list(columns))
        wanted = list(schema.names) if columns is None else list(dict.fromkeys([*columns, *_keys(dataset)]))
        try:
            paths = [file.path for file in files]
            table = self.dataset(dataset, paths).to_table(columns=wanted, filter=filter)
        except (OSError, pa.ArrowInvalid) as error:
            raise InfrastructureError(f"results in {self._path}/{dataset} cannot be read: {error}") from error
        table = newest(table, dataset)
        return table if columns is None else table.select(list(columns))

    def dataset(self, dataset: str, paths: Sequence[str]) -> ds.Dataset:
        """Return files as an Arrow dataset: a column that an older file lacks is null."""
        schema = ROWS_SCHEMA if dataset == "rows" else AUDITS_SCHEMA
        return ds.dataset(list(paths), schema=schema, filesystem=self._filesystem, format="parquet")


def _keys(dataset: str) -> list[str]:
    return ["audit_id", "audited_at"] + (["row"] if dataset == "rows" else [])


def newest(table: pa.Table, dataset: str) -> pa.Table:
    """Keep, of every audit id, the rows of its newest writing, each row once."""
    if not table.num_rows:
        return table
    ids = table.column("audit_id").combine_chunks().dictionary_encode()
    number = np.asarray(ids.indices)
    at = np.asarray(table.column("audited_at").cast(pa.int64()))
    latest = np.full(len(ids.dictionary), np.iinfo(np.int64).min)
    np.maximum.at(latest, number, at)
    kept = at == latest[number]
    row = np.asarray(table.column("row")).astype(np.int64) if dataset == "rows" else np.zeros(len(at), np.int64)
    key = number.astype(np.int64) * (row.max() + 1) + row
    key[~kept] = -1
    unique, first = np.unique(key, return_index=True)
    if len(unique) == len(key):
        return table
    return table.take(pa.array(np.sort(first[unique >= 0])))


def parquet_options(schema: pa.Schema) -> dict[str, Any]:
    """How the store writes Parquet: zstd, dictionaries for strings, byte-stream-split for floats."""
    return {
        "compression": "zstd",
        "use_dictionary": [f.name for f in schema if f.type == _STRING],
        "use_byte_stream_split": [f.name for f in schema if f.type == _FLOAT],
    }


def write_parquet(table: pa.Table, where: Any) -> None:
    """Write a table as the store does."""
    pq.write_table(table, where, **parquet_options(table.schema))


def write_atomically(table: pa.Table, target: Path) -> None:
    """Write a table that readers see whole or not at all."""
    with writing_atomically(target, table.schema) as writer:
        writer.write_table(table)


@contextmanager
def writing_atomically(target: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """Write under a temporary name that no reader looks at; at the end flush to disk and rename."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".writing-{uuid.uuid4().hex}.tmp"
    # as the umask says: `tempfile` would hide results from everybody else who is to read them
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            with pq.ParquetWriter(stream, schema, **parquet_options(schema)) as writer:
                yield writer
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def to_frame(table: pa.Table) -> pd.DataFrame:
    """Return the table as pandas, integers that may be missing as pandas' nullable ones."""
    import pandas as pd  # half a second that an audit's child need not wait for

    return table.to_pandas(
        types_mapper={pa.int16(): pd.Int16Dtype(), pa.int32(): pd.Int32Dtype(), pa.int64(): pd.Int64Dtype()}.get
    )
