"""The names of a recipe's files and folders, for those who look for them and read none. Knows no torch."""

from __future__ import annotations

from pathlib import Path

#: The folder's name, beside a model's other extra files.
FOLDER = "audit"
CODE_FOLDER = "code"
RECIPE_FILE, BATCH_FILE, STATE_FILE = "recipe.yaml", "batch.safetensors", "optimizer.safetensors"

_SUFFIXES = (Path(RECIPE_FILE).suffix, ".safetensors")


def recipe_parts(recipe: Path) -> list[Path]:
    """Return what is a recipe's of a recipe's folder: its files and its code. A recipe's file is its own part."""
    inside = sorted(recipe.iterdir()) if recipe.is_dir() else [recipe]
    return [path for path in inside if not path.is_symlink() and (path.suffix in _SUFFIXES or path.name == CODE_FOLDER)]
