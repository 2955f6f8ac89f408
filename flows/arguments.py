"""What a command is given, looked at before any work: a wrong name, path or setting changes nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from audits.errors import RecipeError, SettingsError, suggest
from flows.settings.environment import GradauditSettings

if TYPE_CHECKING:
    from audits.results.store import ResultsStore

#: What the folder of a recipe holds, and where in other folders such a folder is.
_RECIPE_FILE, _PLACES = "recipe.yaml", ("audit", "extra_files/audit")


def refuse_output(path: Path | None, option: str) -> None:
    """Refuse a file that could not be written once the work is done.

    Raises:
        SettingsError: its folder is not there, a folder stands in its place, or this user may not write it.
    """
    if path is None:
        return
    folder = path.absolute().parent
    if path.is_dir():
        raise SettingsError(f"{option} {path}: that is a folder; name a file in it")
    if not folder.is_dir():
        raise SettingsError(f"{option} {path}: there is no folder {folder}{_near(folder)}; make it first")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise SettingsError(f"{option} {path}: this user may not write there")


def recipe_folder(folder: Path) -> Path:
    """Return the folder when it holds a recipe that can be read.

    Raises:
        RecipeError: it holds none; the text says where one is, or what is wrong in it.
    """
    from registry_models.recipes.recipe_files import read_recipe

    if folder.is_file():
        held = f", {folder.absolute().parent}" if folder.name == _RECIPE_FILE else ""
        raise RecipeError(f"the recipe {folder} is a file: give the folder that holds {_RECIPE_FILE}{held}")
    if not folder.is_dir():
        raise RecipeError(f"the recipe's folder {folder} does not exist{_near(folder)}")
    if not (folder / _RECIPE_FILE).is_file():
        inner = next((f for f in (folder / place for place in _PLACES) if (f / _RECIPE_FILE).is_file()), None)
        hint = f"; did you mean {str(inner)!r}?" if inner else ""
        raise RecipeError(f"the folder {folder} holds no {_RECIPE_FILE}{hint}")
    try:
        read_recipe(folder)
    except RecipeError as error:
        raise RecipeError(f"the recipe in {folder}: {error}") from error
    return folder


def refuse_file(folder: Path, option: str) -> None:
    """Refuse a file where a folder is to be made.

    Raises:
        SettingsError: there is one.
    """
    if folder.exists() and not folder.is_dir():
        raise SettingsError(f"{option} {folder}: that is a file; name a folder")


def refuse_absent(store: ResultsStore) -> None:
    """Refuse a results folder that is not there: an empty answer from it would be no answer.

    Raises:
        SettingsError: the text names the nearest, and what makes one.
    """
    folder = store.local_folder
    if folder is not None and not folder.is_dir():
        hint = _near(folder) or ": `gradaudit audit` or `gradaudit nightly` makes one, --results names another"
        raise SettingsError(f"there is no results folder {store.root}{hint}")


def refuse_settings(settings: GradauditSettings) -> None:
    """Refuse settings that name files which are not there, or cannot be read.

    Raises:
        SettingsError: waivers, or the recipe repository, are missing or broken.
    """
    from flows.team_policy import waivers_of
    from registry_models.recipes.recipe_sources import matching_recipes

    waivers_of(settings)
    if settings.recipes_folder is not None:
        try:
            matching_recipes(settings.recipes_folder, "")
        except RecipeError as error:
            raise SettingsError(f"GRADAUDIT_RECIPES: {error}") from error


def refuse_device(device: str) -> None:
    """Refuse a device that torch does not find here; ``auto`` always finds one.

    Raises:
        SettingsError: the text names the nearest, or what there is.
    """
    if device in ("auto", "cpu"):
        return
    from audits.devices import choose_device

    try:
        choose_device(device)
    except RecipeError as error:
        raise SettingsError(f"{error}") from error


def _near(path: Path) -> str:
    """Suggest a name beside a path that is not there."""
    folder = path.absolute().parent
    try:
        names = [entry.name for entry in folder.iterdir() if entry.is_dir()]
    except OSError:
        return ""
    return suggest(path.name, names)
