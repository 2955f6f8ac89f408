"""The digest of a model directory: over the names and contents of its files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from audits.short_digests import short_digest
from registry_models.artifacts.files_below import files_in

#: MLflow writes this file beside MLmodel when it downloads a registered version; it is no part of the model.
_NOT_CONTENT = "registered_model_meta"

#: Characters of a SHA-256; results store the first 32.
WHOLE, STORED = 64, 32


def content_files(folder: Path) -> list[Path]:
    """Return the files that are content, in the order of their paths.

    Raises:
        ArtifactError: a symbolic link, a name that is not UTF-8, more files or deeper folders than a model has.
    """
    return [path for path in files_in(folder) if path != folder / _NOT_CONTENT]


def contents_of(files: Sequence[Path]) -> list[tuple[Path, str]]:
    """Return each file with the SHA-256 of its content."""
    contents = []
    for path in files:
        with path.open("rb") as stream:
            contents.append((path, hashlib.file_digest(stream, "sha256").hexdigest()))
    return contents


def content_digest(folder: Path, contents: Sequence[tuple[Path, str]], length: int = STORED) -> str:
    r"""Return the SHA-256 over a line ``PATH\0SHA-256`` of each file in order of their paths, or its beginning.

    Args:
        folder: the model directory.
        contents: what `contents_of` returned of it.
        length: characters to keep, at most 64.
    """
    return short_digest((f"{path.relative_to(folder).as_posix()}\0{content}\n" for path, content in contents), length)


def whole_digest(folder: Path) -> str:
    """Return the whole SHA-256 of a model directory's files.

    Raises:
        ArtifactError: it holds what no model directory holds.
    """
    return content_digest(folder, contents_of(content_files(folder)), WHOLE)
