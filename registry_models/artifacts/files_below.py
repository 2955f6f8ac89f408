"""The files below a folder that a stranger filled: no links, and bounds on their number, depth and names."""

from __future__ import annotations

import os
from pathlib import Path

from audits.errors import ArtifactError

#: A model of many shards with its code and recipe has some hundred files, about five folders deep.
MAXIMUM_FILES = 20_000
MAXIMUM_DEPTH = 40


def files_in(folder: Path) -> list[Path]:
    """Return the files below a folder, in the order of their paths.

    Raises:
        ArtifactError: a symbolic link, a name that is not UTF-8, more files or deeper folders than a model has.
    """
    found: list[Path] = []
    pending = [(folder, 0)]
    entries = 0
    while pending:
        place, depth = pending.pop()
        if depth > MAXIMUM_DEPTH:
            raise ArtifactError(f"the model's folders are nested deeper than {MAXIMUM_DEPTH}: refused")
        with os.scandir(place) as listed:
            for entry in listed:
                entries += 1
                path = place / entry.name
                if entries > MAXIMUM_FILES:
                    raise ArtifactError(f"the model has more than {MAXIMUM_FILES:,} files: refused")
                if not _utf8(entry.name):
                    raise ArtifactError(f"the model has a file whose name is not UTF-8, {entry.name!a}: refused")
                if entry.is_symlink():
                    raise ArtifactError(f"the model's files hold a symbolic link, {path.relative_to(folder)}: refused")
                if entry.is_dir(follow_symlinks=False):
                    pending.append((path, depth + 1))
                elif entry.is_file(follow_symlinks=False):
                    found.append(path)
    return sorted(found)


def _utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
