"""What an audit is shown of its artifact, and whether it left the artifact alone."""

from __future__ import annotations

from pathlib import Path

from audits.errors import ArtifactError
from registry_models.artifacts.snapshot import Snapshot, read_snapshot
from registry_models.recipes.recipe_names import recipe_parts


def shown(snapshot: Snapshot) -> list[Path]:
    """Return the files and folders an audit may read.

    Of a recipe that is not the version's own these are the recipe's files and its code; whatever else its folder
    holds, a user's project perhaps, stays out.
    """
    recipes = {source.path for source in snapshot.sources} | {snapshot.recipe_folder}
    found = [snapshot.folder]
    for recipe in sorted(path for path in recipes if path is not None):
        if recipe.is_relative_to(snapshot.folder):
            continue
        found += recipe_parts(recipe)
    return found


def rewritten(snapshot: Snapshot) -> bool:
    """Whether the snapshot's files are no longer those that were downloaded."""
    try:
        return read_snapshot(snapshot.folder).digest != snapshot.digest
    except (ArtifactError, OSError):
        return True
