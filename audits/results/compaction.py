"""Many small files into few, under a lock. A crash at any point loses nothing and doubles nothing.

A file per audit would be 3.65 million files a year for 10,000 models. A day's files are merged into one,
``audit_date=2026-01-31/merged-....parquet``, sorted by model, version and parameter; a month's into one in the folder
``audit_date=2026-01``, sorted by model, parameter and time, so that a parameter's history lies in one row group.

The merged file appears whole before those it was made of go. Between the two, and after a crash there, a reader finds
an audit in both: it takes the finer file (`audits.results.queries`) or each row once (`ResultsStore.read`), and the
next compaction takes the leftovers away. A file that changed after it was read (a retry of the same audit) stays.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from audits.errors import InfrastructureError, InputError
from audits.results.files import Layer, StoreFile
from audits.results.store import ResultsStore, newest, writing_atomically
from audits.short_digests import short_digest

_log = logging.getLogger(__name__)

#: Rows per row group of a merged file: small enough that one parameter's history, or the failures of a night, skip
#: nearly all of them by their statistics; large enough that a month's footer stays at a few megabytes.
ROW_GROUP = {Layer.DAY: 20_000, Layer.MONTH: 50_000}

#: Rows that a merge holds in memory at a time, about 1 kB each; a model with more of them in a month is held whole.
CHUNK = 600_000

_ORDER = {
    ("rows", Layer.DAY): ("model_name", "model_version", "parameter", "audited_at", "row"),
    ("rows", Layer.MONTH): ("model_name", "parameter", "audited_at", "row"),
    ("audits", Layer.DAY): ("model_name", "model_version", "audited_at"),
    ("audits", Layer.MONTH): ("model_name", "model_version", "audited_at"),
}
_MONTH = re.compile(r"\d{4}-(0[1-9]|1[0-2])")

#: Seconds after which a file that is still being written is taken for a killed process's: longer than any merge takes.
ABANDONED = 24 * 3600

#: A file that is about to go is first given this prefix, under which no reader looks.
_TAKEN = ".taken-"


def compact(store: ResultsStore, *, before: datetime.date) -> int:
    """Merge the files of every day before ``before``, each day's into one; return the number of files merged away.

    Args:
        store: a results store in a local folder; object stores are left as they are.
        before: days from this one on are left alone.

    Raises:
        InfrastructureError: the disk refused.
    """
    last = before - datetime.timedelta(1)
    return _compact(store, Layer.DAY, [], last)


def compact_months(store: ResultsStore, months: Sequence[str], *, before: datetime.date) -> int:
    """Merge every day before ``before`` of these months into one file a month; return the number merged away.

    Args:
        store: a results store in a local folder; object stores are left as they are.
        months: ``2026-10``, ...
        before: days from this one on are left alone.

    Raises:
        InputError: a month that is none.
        InfrastructureError: the disk refused.
    """
    for month in months:
        if not _MONTH.fullmatch(month):
            raise InputError(f"{month!r} is not a month: write it as 2026-10")
    return _compact(store, Layer.MONTH, months, before - datetime.timedelta(1))


def ended_months(store: ResultsStore, *, today: datetime.date) -> list[str]:
    """Return the months before the present one that are not one file a dataset yet."""
    apart = set()
    for dataset in ("rows", "audits"):
        files = store.files(dataset, until=today)
        whole = [file.month for file in files if file.layer is Layer.MONTH]
        apart |= {file.month for file in files if file.layer is not Layer.MONTH or whole.count(file.month) > 1}
    return sorted(month for month in apart if month < today.isoformat()[:7])


def _compact(store: ResultsStore, layer: Layer, months: Sequence[str], last: datetime.date) -> int:
    root = store.local_folder
    if root is None or not root.is_dir():
        return 0
    merged = 0
    try:
        with FileLock(root / ".compaction.lock", timeout=0):
            for dataset in ("rows", "audits"):
                _tidy(root / dataset)
                groups: dict[str, list[StoreFile]] = {}
                for file in store.files(dataset, until=last):
                    period = file.period if layer is Layer.DAY else file.month
                    wanted = file.layer is not Layer.MONTH if layer is Layer.DAY else file.month in months
                    if wanted:
                        groups.setdefault(period, []).append(file)
                for period, files in sorted(groups.items()):
                    # of a day, one audit's file alone is as good as a merged one
                    if len(files) > 1 or (layer is Layer.MONTH and files[0].layer is not layer):
                        merged += _merge(store, dataset, files, root / dataset / f"audit_date={period}", layer)
    except Timeout:
        _log.info("another compaction is under way")
    except (OSError, pa.ArrowInvalid) as error:
        raise InfrastructureError(f"results in {root} could not be compacted: {error}") from error
    return merged


def _merge(store: ResultsStore, dataset: str, files: Sequence[StoreFile], folder: Path, layer: Layer) -> int:
    paths = [Path(file.path) for file in files]
    states = {path: _state(path) for path in paths}
    source = store.dataset(dataset, [file.path for file in files])
    name = short_digest("\0".join(file.path for file in files))
    target = folder / f"merged-{name}.parquet"
    with writing_atomically(target, source.schema) as writer:
        for part in _parts(paths):
            table = newest(source.to_table(filter=part), dataset)
            if table.num_rows:
                table = table.take(_order(table, _ORDER[dataset, layer]))
                writer.write_table(table, row_group_size=ROW_GROUP[layer])
    gone = sum(_take_away(path, states[path]) for path in paths if path != target)
    for emptied in {path.parent for path in paths} - {folder}:
        if not any(emptied.iterdir()):
            emptied.rmdir()
    return gone


def _parts(paths: Sequence[Path]) -> Iterator[ds.Expression]:
    """Ranges of model names that hold about `CHUNK` rows each, by the row groups' statistics."""
    groups: list[tuple[str, int]] = []
    for path in paths:
        footer = pq.read_metadata(path)
        column = footer.schema.names.index("model_name")
        for index in range(footer.num_row_groups):
            group = footer.row_group(index)
            statistics = group.column(column).statistics
            if statistics is None or not statistics.has_min_max:  # a name beyond what statistics hold
                groups = []
                break
            groups.append((statistics.max, group.num_rows))
    name, lower, count = ds.field("model_name"), None, 0
    for upper, rows in sorted(groups):
        count += rows
        if count >= CHUNK and upper != lower:
            yield name <= upper if lower is None else (name > lower) & (name <= upper)
            lower, count = upper, 0
    yield ds.scalar(True) if lower is None else name > lower


def _order(table: pa.Table, columns: Sequence[str]) -> pa.Array:
    """Indices that sort the table; strings are compared once a name, not once a row."""
    keys = []
    for column in columns:
        values = table.column(column).combine_chunks()
        if pa.types.is_string(values.type):
            coded = values.dictionary_encode()
            names = coded.dictionary.to_pylist()
            rank = np.empty(len(names) + 1, np.int64)
            rank[np.array(sorted(range(len(names)), key=names.__getitem__), np.int64)] = np.arange(len(names))
            rank[-1] = -1  # none comes first
            keys.append(rank[np.asarray(coded.indices.fill_null(len(names)))])
        else:
            keys.append(np.asarray(values.cast(pa.int64()).fill_null(-1)))
    return pa.array(np.lexsort(keys[::-1]))


def _state(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _take_away(path: Path, state: tuple[int, int, int]) -> bool:
    """Delete the file that was read; whatever has come in its place meanwhile stays."""
    taken = path.with_name(f"{_TAKEN}{path.name}")
    path.rename(taken)
    if _state(taken) == state:
        taken.unlink()
        return True
    if not path.exists():
        taken.rename(path)
    else:  # a still newer one is there
        taken.unlink()
    return False


def _tidy(folder: Path) -> None:
    """Clear up after a kill: files that nobody finished go, and those a compaction had in its hand come back.

    Nothing says whether it had read the latter; readers and the merge that follows take each audit once anyway.
    """
    for unfinished in folder.glob("audit_date=*/.writing-*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # finished just now
            if unfinished.stat().st_mtime < time.time() - ABANDONED:
                unfinished.unlink()
    for taken in folder.glob(f"audit_date=*/{_TAKEN}*"):
        path = taken.with_name(taken.name.removeprefix(_TAKEN))
        if path.exists():
            taken.unlink()
        else:
            os.rename(taken, path)
