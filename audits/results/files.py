"""The files of a results store, told by their names: which day or month, one audit's or merged."""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeVar

from pyarrow import fs

from audits.errors import InfrastructureError

_FOLDER = re.compile(r"^audit_date=(\d{4}-\d{2}(?:-\d{2})?)$")
_PART = re.compile(r"^part-(.+)\.parquet$")


_T = TypeVar("_T")

#: How often files may be taken away while they are read: a compaction does so once a day.
_TRIES = 3


class Layer(IntEnum):
    """How far a file is merged. A finer file is what a coarser one was made of, or newer: it wins."""

    MONTH = 0
    DAY = 1
    AUDIT = 2


@dataclass(frozen=True, order=True)
class StoreFile:
    """One Parquet file.

    Attributes:
        path: as the store's filesystem takes it.
        period: ``2026-01-31``, or ``2026-01`` for a merged month.
        audit_id: of a file that holds one audit; None for a merged one.
    """

    path: str
    period: str
    audit_id: str | None = None

    @property
    def layer(self) -> Layer:
        """How far it is merged."""
        if self.audit_id is not None:
            return Layer.AUDIT
        return Layer.MONTH if len(self.period) == len("2026-01") else Layer.DAY

    @property
    def month(self) -> str:
        """``2026-01``."""
        return self.period[:7]


def while_files_move(read: Callable[[], _T]) -> _T:
    """Return what ``read`` returns; a compaction that takes files away meanwhile makes it list and read again.

    Raises:
        InfrastructureError: whatever else ``read`` meets.
    """
    for _ in range(_TRIES):
        try:
            return read()
        except FileNotFoundError:
            continue
        except InfrastructureError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
    return read()


def list_files(
    filesystem: fs.FileSystem,
    folder: str,
    *,
    since: datetime.date | None = None,
    until: datetime.date | None = None,
) -> list[StoreFile]:
    """Return the Parquet files under ``folder``, those of days outside ``since`` to ``until`` left out.

    Raises:
        InfrastructureError: the folder is there and cannot be listed.
    """
    try:
        local = isinstance(filesystem, fs.LocalFileSystem)
        named = _local(folder, since, until) if local else _remote(filesystem, folder, since, until)
        found = [StoreFile(path, period, m[1] if (m := _PART.match(name)) else None) for path, period, name in named]
    except OSError as error:
        raise InfrastructureError(f"results in {folder} cannot be listed: {error}") from error
    return sorted(found)


def _local(folder: str, since: datetime.date | None, until: datetime.date | None) -> Iterable[tuple[str, str, str]]:
    if not os.path.isdir(folder):
        return
    for entry in os.scandir(folder):
        match = _FOLDER.match(entry.name)
        if match and _within(match[1], since, until):
            for name in os.listdir(entry.path):
                if _is_result(name):
                    yield f"{entry.path}/{name}", match[1], name


def _remote(
    filesystem: fs.FileSystem, folder: str, since: datetime.date | None, until: datetime.date | None
) -> Iterable[tuple[str, str, str]]:
    for info in filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True, recursive=True)):
        parent = info.path.rpartition("/")[0].rpartition("/")[2]
        match = _FOLDER.match(parent)
        if match and info.type == fs.FileType.File and _is_result(info.base_name) and _within(match[1], since, until):
            yield info.path, match[1], info.base_name


def _is_result(name: str) -> bool:
    """Whether it is a finished file: what is being written has a name that begins with a dot."""
    return name.endswith(".parquet") and not name.startswith((".", "_"))


def _within(period: str, since: datetime.date | None, until: datetime.date | None) -> bool:
    """Whether a day, or any day of a month, lies in the range; both ends belong to it."""
    early = since is None or period >= since.isoformat()[: len(period)]
    return early and (until is None or period <= until.isoformat()[: len(period)])
