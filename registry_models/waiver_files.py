"""The waivers file: safe YAML of a capped size."""

from __future__ import annotations

from pathlib import Path

from audits.errors import RecipeError, SettingsError
from audits.waivers import Waiver, waivers_from_plain
from registry_models.recipes.plain_yaml import load_yaml

#: Ten thousand waivers take about 3 MiB; nobody reads more.
MAXIMUM_BYTES = 4 * 2**20


def read_waivers(path: Path) -> tuple[Waiver, ...]:
    """Read a waivers file; see ``docs/how_to/waive.md`` for its form.

    Raises:
        SettingsError: it is missing, too large, no plain YAML, or says something impossible; the text names the place.
    """
    if path.is_file() and path.stat().st_size > MAXIMUM_BYTES:
        raise SettingsError(f"the waivers file {path} is larger than {MAXIMUM_BYTES // 2**20} MiB")
    try:
        plain = load_yaml(path)
    except RecipeError as error:
        raise SettingsError(f"the waivers file {path}: {error}") from error
    return waivers_from_plain(plain, source=str(path))
