"""Torch's zip archives looked at without unpickling: what kind they are, and whether they would expand."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from audits.errors import ArtifactError

#: Torch writes its records uncompressed. What claims to grow to more than twice the file is no archive of torch's.
_GROWTH = 2
_MARGIN = 2**20


#: A model of 2,000 tensors has 2,100 records, of some 100 bytes each in the table of contents.
MAXIMUM_RECORDS = 50_000
_MAXIMUM_TABLE = 1_000 * MAXIMUM_RECORDS


@contextlib.contextmanager
def opened_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a zip whose table of contents is of a model's size; how long it is stands at the file's end.

    Raises:
        zipfile.BadZipFile: it is none, or its table is longer.
    """
    # The standard library's own reader of that record; it has no public name.
    end_record: Any = zipfile._EndRecData  # type: ignore[attr-defined]
    with path.open("rb") as stream:
        record = end_record(stream)
    entries, size = (record[4], record[5]) if record else (0, 0)
    if entries > MAXIMUM_RECORDS or size > _MAXIMUM_TABLE:
        raise zipfile.BadZipFile(f"more than {MAXIMUM_RECORDS:,} records")
    with zipfile.ZipFile(path) as archive:
        yield archive


def refuse_expanding(path: Path) -> None:
    """Refuse a zip whose records are larger than the file that holds them.

    Raises:
        ArtifactError: it is truncated, corrupt or would expand.
    """
    try:
        with opened_archive(path) as archive:
            total = sum(record.file_size for record in archive.infolist())
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError) as error:
        raise ArtifactError(f"the model file {path.name} is missing, truncated or corrupt: {error}") from error
    if total > _GROWTH * path.stat().st_size + _MARGIN:
        raise ArtifactError(
            f"the model file {path.name} would expand from {path.stat().st_size:,} to {total:,} bytes: refused"
        )


def is_torchscript(path: Path) -> bool:
    """Whether the file is a TorchScript archive: a zip with ``constants.pkl`` and ``code/`` in it."""
    try:
        with opened_archive(path) as archive:
            names = [name.partition("/")[2] for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):  # no zip, or a broken one
        return False
    return "constants.pkl" in names and any(name.startswith("code/") for name in names)
