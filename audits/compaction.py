"""Many small files into few: one file per dataset and day, under a lock. A crash loses nothing and doubles nothing.

A file per audit would be 3.65 million files a year for 10,000 models. A day's files are merged into one, sorted by
model, version and parameter, so that one parameter's history reads few row groups. The merged file appears whole before
the small ones go; between the two `ResultsStore.read` shows each audit once, and the next compaction heals what a crash
left behind.
"""

from __future__ import annotations

import datetime
import hashlib
import logging
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from audits.errors import InfrastructureError
from audits.results import AUDITS_SCHEMA, ROWS_SCHEMA, ResultsStore, newest, write_atomically

_log = logging.getLogger(__name__)

#: Rows per row group of a merged file: small enough that one parameter's year skips nearly all of them.
ROW_GROUP = 50_000

_SORTED = {
    "rows": [
        ("model_name", "ascending"),
        ("model_version", "ascending"),
        ("parameter", "ascending"),
        ("row", "ascending"),
    ],
    "audits": [("model_name", "ascending"), ("model_version", "ascending")],
}
_DAY = re.compile(r"audit_date=(\d{4}-\d{2}-\d{2})$")


def compact(store: ResultsStore, *, before: datetime.date) -> int:
    """Merge the files of every day before ``before``; return the number of files merged away.

    Args:
        store: a results store in a local folder; object stores are left as they are.
        before: days from this one on are left alone: audits still write there.

    Raises:
        InfrastructureError: the disk refused.
    """
    root = store.local_folder
    if root is None or not root.is_dir():
        return 0
    merged = 0
    try:
        with FileLock(root / ".compaction.lock", timeout=0):
            for dataset in ("rows", "audits"):
                for folder in sorted((root / dataset).glob("audit_date=*")):
                    day = _DAY.search(folder.name)
                    if day and datetime.date.fromisoformat(day[1]) < before:
                        merged += _merge(dataset, folder)
    except Timeout:
        _log.info("another compaction is under way")
    except (OSError, pa.ArrowInvalid) as error:
        raise InfrastructureError(f"results in {root} could not be compacted: {error}") from error
    return merged


def _merge(dataset: str, folder: Path) -> int:
    files = sorted(folder.glob("*.parquet"))
    if len(files) < 2:
        return 0
    schema = ROWS_SCHEMA if dataset == "rows" else AUDITS_SCHEMA
    table = pa.concat_tables([_conformed(pq.read_table(file, partitioning=None), schema) for file in files])
    table = newest(table, dataset).sort_by(_SORTED[dataset])
    name = hashlib.sha256("\0".join(file.name for file in files).encode()).hexdigest()[:16]
    target = folder / f"merged-{name}.parquet"
    write_atomically(table, target, row_group_size=ROW_GROUP)
    gone = [file for file in files if file != target]
    for file in gone:
        file.unlink(missing_ok=True)
    return len(gone)


def _conformed(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Give an older file the columns it lacks, as nulls."""
    columns = [
        table.column(f.name).cast(f.type) if f.name in table.column_names else pa.nulls(table.num_rows, f.type)
        for f in schema
    ]
    return pa.table(columns, schema=schema)
