"""What an audit is shown of its artifact, and whether it left the artifact alone."""

from __future__ import annotations

from pathlib import Path

from audits.errors import ArtifactError
from registry_models.recipe_files import RECIPE_FILE
from registry_models.snapshot import Snapshot, read_snapshot


def shown(snapshot: Snapshot) -> list[Path]:
    """Return the files and folders an audit may read.

    Of a recipe that is not the version's own these are the recipe's files; whatever else its folder holds stays out.
    """
    folder = snapshot.recipe_folder
    if folder is None or folder.is_relative_to(snapshot.folder) or not folder.is_dir():
        return [snapshot.folder]
    suffixes = Path(RECIPE_FILE).suffix, ".safetensors"
    files = [path for path in sorted(folder.iterdir()) if path.suffix in suffixes and not path.is_symlink()]
    return [snapshot.folder, *files]


def rewritten(snapshot: Snapshot) -> bool:
    """Whether the snapshot's files are no longer those that were downloaded."""
    try:
        return read_snapshot(snapshot.folder).digest != snapshot.digest
    except (ArtifactError, OSError):
        return True
