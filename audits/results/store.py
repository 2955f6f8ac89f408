"""The results store: where the rows and audits of `audits.results.format` are written to and read from.

Layout, under one root (a folder or an object-store URI):

```
rows/audit_date=2026-01-31/part-<audit_id>.parquet     one row per audit, phase, step, lane, check and parameter
audits/audit_date=2026-01-31/part-<audit_id>.parquet   one row per audit, written last: the audit's commit
```

`audits.results.compaction` merges a day's files into ``merged-...``, a month's into the folder ``audit_date=2026-01``.
"""

from __future__ import annotations

import datetime
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow import fs

from audits.errors import InfrastructureError, SettingsError
from audits.results.disk_troubles import disk_trouble
from audits.results.files import StoreFile, list_files, while_files_move
from audits.results.format import AUDITS_SCHEMA, ROWS_SCHEMA

if TYPE_CHECKING:
    import pandas as pd


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
    def place(self) -> str:
        """The root as any process takes it: a local folder's whole path, or the URI."""
        return self._path if self.local_folder is not None else self.root

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
            raise _write_trouble(error, target) from error
        return target

    def write_beside(self, folder: str, name: str, table: pa.Table) -> None:
        """Write a table whole into a folder beside the datasets.

        Raises:
            InfrastructureError: the disk or the object store refused.
        """
        target = f"{self._path}/{folder}/{name}"
        try:
            if isinstance(self._filesystem, fs.LocalFileSystem):
                write_atomically(table, Path(target))
            else:
                with self._filesystem.open_output_stream(target) as stream:
                    write_parquet(table, stream)
        except OSError as error:
            raise _write_trouble(error, target) from error

    def names_beside(self, folder: str) -> list[str]:
        """Return the names of the finished files in a folder beside the datasets.

        Raises:
            InfrastructureError: it is there and cannot be listed.
        """
        try:
            found = self._filesystem.get_file_info(fs.FileSelector(f"{self._path}/{folder}", allow_not_found=True))
        except OSError as error:
            raise InfrastructureError(f"results in {self._path}/{folder} cannot be listed: {error}") from error
        return sorted(i.base_name for i in found if i.base_name.endswith(".parquet") and i.base_name[0] != ".")

    def read_beside(self, folder: str, names: Sequence[str], schema: pa.Schema) -> pa.Table:
        """Read files of a folder beside the datasets.

        Raises:
            InfrastructureError: they cannot be read.
        """
        paths = [f"{self._path}/{folder}/{name}" for name in names]
        try:
            return ds.dataset(paths, schema=schema, filesystem=self._filesystem, format="parquet").to_table()
        except (OSError, pa.ArrowInvalid) as error:
            raise InfrastructureError(f"results in {self._path}/{folder} cannot be read: {error}") from error

    def remove_beside(self, folder: str, names: Sequence[str]) -> None:
        """Remove files of a folder beside the datasets; what another process has removed already is gone too."""
        for name in names:
            with suppress(FileNotFoundError):
                self._filesystem.delete_file(f"{self._path}/{folder}/{name}")

    def withdraw_rows(self, *, date: datetime.date, audit_id: str) -> None:
        """Remove the rows of an audit that was not committed: whoever reads the files alone would take them for one.

        Raises:
            InfrastructureError: the disk or the object store refused.
        """
        rows, audit = (
            f"{self._path}/{dataset}/audit_date={date.isoformat()}/part-{audit_id}.parquet"
            for dataset in ("rows", "audits")
        )
        try:
            found, committed = self._filesystem.get_file_info([rows, audit])
            if found.type == fs.FileType.File and committed.type == fs.FileType.NotFound:
                self._filesystem.delete_file(rows)
        except OSError as error:
            raise _write_trouble(error, rows) from error

    def prove_writable(self) -> None:
        """Make the store's folder and write into it, so that this is known before anything is audited.

        Raises:
            InfrastructureError: it cannot be written.
        """
        probe = f"{self._path}/.writable-{uuid.uuid4().hex}.tmp"
        try:
            if isinstance(self._filesystem, fs.LocalFileSystem):
                os.makedirs(self._path, exist_ok=True)
            with self._filesystem.open_output_stream(probe) as stream:
                stream.write(b"gradaudit")
            self._filesystem.delete_file(probe)
        except OSError as error:
            raise _write_trouble(error, self.root) from error

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
                the newest writing's rows away and leave an older one's; `audits.results.queries` has no such limit.
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


def _write_trouble(error: OSError, target: str) -> InfrastructureError:
    return disk_trouble(error, "the results cannot be written (--results, GRADAUDIT_RESULTS)", target) or (
        InfrastructureError(f"results could not be written to {target}: {error}")
    )


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
        "use_dictionary": [f.name for f in schema if f.type == pa.string()],
        "use_byte_stream_split": [f.name for f in schema if f.type == pa.float64()],
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
