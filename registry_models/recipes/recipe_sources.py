"""Where a version's recipe can come from, best first, and how far each place is trusted.

1. ``given``: a folder named on the command line;
2. ``trusted``: a file of the recipe repository whose globs match the model's name; it may give only some fields;
3. ``tag``: a folder that the tag ``audit.recipe`` names; anybody may set a tag, so what lowers scrutiny costs coverage;
4. ``version``: ``extra_files/audit/`` in the version.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from audits.errors import RecipeError
from audits.globs import matches
from audits.short_digests import short_digest
from registry_models.recipes.plain_yaml import load_yaml
from registry_models.recipes.recipe_names import CODE_FOLDER


class Trust(StrEnum):
    """Who vouches for a recipe."""

    GIVEN = "given"
    TRUSTED = "trusted"
    TAG = "tag"
    VERSION = "version"


@dataclass(frozen=True)
class RecipeSource:
    """One place.

    Attributes:
        trust: who vouches for it.
        label: how reports name it.
        path: a recipe's folder; for ``trusted``, one YAML file.
    """

    trust: Trust
    label: str
    path: Path

    def to_plain(self) -> dict[str, str]:
        """Return plain strings, for the child's request."""
        return {"trust": str(self.trust), "label": self.label, "path": str(self.path)}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> RecipeSource:
        """Read what `to_plain` returned."""
        return cls(Trust(plain["trust"]), str(plain["label"]), Path(str(plain["path"])))

    @property
    def code_folder(self) -> Path | None:
        """Code that came with the recipe, or None."""
        code = self.path / CODE_FOLDER
        return code if self.path.is_dir() and code.is_dir() else None


def matching_recipes(folder: Path, model_name: str) -> list[Path]:
    """Return the repository's files whose ``models`` globs match, in the order of their names.

    Raises:
        RecipeError: a file that is no recipe; one broken file must not be passed over silently.
    """
    if not folder.is_dir():
        raise RecipeError(f"the recipe repository {folder} is not a folder")
    found = []
    for path in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]):
        plain = load_yaml(path)
        globs = plain.get("models") if isinstance(plain, Mapping) else None
        if isinstance(globs, str):
            globs = [globs]
        if not isinstance(globs, list) or not all(isinstance(glob, str) for glob in globs):
            raise RecipeError(f"recipe file {path.name} must list its model names: models: ['team-a/*']")
        if matches(model_name, globs):
            found.append(path)
    return found


def matching_digest(folder: Path, model_name: str) -> str:
    """Return a digest of the files that concern a model: when it changes, a verdict may change.

    Raises:
        RecipeError: as `matching_recipes`.
    """
    files = matching_recipes(folder, model_name)
    return short_digest(part for path in files for part in (path.name, "\0", path.read_bytes(), "\0"))


def copy_matching(folder: Path, model_name: str, target: Path) -> list[RecipeSource]:
    """Copy the matching files into ``target``, so that an audit's child sees them and nothing else of the repository.

    Raises:
        RecipeError: as `matching_recipes`.
    """
    sources = []
    for path in matching_recipes(folder, model_name):
        target.mkdir(parents=True, exist_ok=True)
        copied = target / path.name
        shutil.copyfile(path, copied)
        sources.append(RecipeSource(Trust.TRUSTED, f"recipes/{path.name}", copied))
    return sources


def code_folders(own: Path | None, sources: Iterable[RecipeSource]) -> tuple[Path, ...]:
    """Return the version's own code first, then the code that came with recipes."""
    found = [own, *(source.code_folder for source in sources)]
    return tuple(folder for folder in found if folder is not None)
