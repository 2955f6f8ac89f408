"""``gradaudit.toml``, or the table ``[tool.gradaudit]`` of a ``pyproject.toml``: settings that belong to a project."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from audits.errors import SettingsError, suggest

FILE, PROJECT_FILE = "gradaudit.toml", "pyproject.toml"

#: Settings that name files: in a settings file they are relative to it, not to wherever a worker happens to start.
PATHS = ("results", "recipes", "waivers", "state")


@dataclass(frozen=True)
class SettingsFile:
    """What a settings file says.

    Attributes:
        label: how messages name it.
        values: setting -> value; paths are absolute.
    """

    label: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)


def find_settings_file(folder: Path, chosen: str, known: Collection[str], secret: Collection[str]) -> SettingsFile:
    """Read the settings file of a folder: ``gradaudit.toml`` where there is one, ``pyproject.toml`` otherwise.

    Args:
        folder: the working directory.
        chosen: the path of a file to read instead; empty for none.
        known: names of the settings there are.
        secret: names of those that belong in the environment only.

    Raises:
        SettingsError: the file is missing or no TOML, or has a setting that does not exist; the text names the nearest.
    """
    own, project = folder / FILE, folder / PROJECT_FILE
    if chosen:
        path = Path(chosen)
        if not path.is_file():
            raise SettingsError(f"GRADAUDIT_CONFIG: there is no file {chosen}")
    elif own.is_file():
        path = own
    elif project.is_file():
        path = project
    else:
        return SettingsFile()
    values = _read(path)
    label = str(path) if chosen else path.name
    if path.name == PROJECT_FILE:
        tools = values.get("tool", {})
        if "gradaudit" not in tools:
            return SettingsFile()
        values, label = tools["gradaudit"], f"{label} [tool.gradaudit]"
        if not isinstance(values, dict):
            raise SettingsError(f"{label}: must be a table")
    for name in values:
        if name in secret:
            raise SettingsError(f"{label}: {name} is a secret; set GRADAUDIT_{name.upper()} in the environment instead")
        if name not in known:
            raise SettingsError(f"{label}: there is no setting {name!r}{suggest(name, known)}")
    return SettingsFile(label, {name: _absolute(name, value, path.parent) for name, value in values.items()})


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path.name} is not TOML: {error}") from error
    except OSError as error:
        raise SettingsError(f"{path.name} cannot be read: {error}") from error


def _absolute(name: str, value: Any, folder: Path) -> Any:
    if name not in PATHS or not isinstance(value, str) or not value or "://" in value:
        return value
    return str((folder / Path(value).expanduser()).resolve())
