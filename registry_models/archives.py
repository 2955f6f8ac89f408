"""Torch's zip archives looked at without unpickling: what kind they are, and whether they would expand."""

from __future__ import annotations

import zipfile
from pathlib import Path

from audits.errors import ArtifactError

#: Torch writes its records uncompressed. What claims to grow to more than twice the file is no archive of torch's.
_GROWTH = 2
_MARGIN = 2**20


def refuse_expanding(path: Path) -> None:
    """Refuse a zip whose records are larger than the file that holds them.

    Raises:
        ArtifactError: it is truncated, corrupt or would expand.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            total = sum(record.file_size for record in archive.infolist())
    except (zipfile.BadZipFile, OSError, EOFError, ValueError) as error:
        raise ArtifactError(f"the model file {path.name} is missing, truncated or corrupt: {error}") from error
    if total > _GROWTH * path.stat().st_size + _MARGIN:
        raise ArtifactError(
            f"the model file {path.name} would expand from {path.stat().st_size:,} to {total:,} bytes: refused"
        )


def is_torchscript(path: Path) -> bool:
    """Whether the file is a TorchScript archive: a zip with ``constants.pkl`` and ``code/`` in it."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = [name.partition("/")[2] for name in archive.namelist()]
    return "constants.pkl" in names and any(name.startswith("code/") for name in names)
