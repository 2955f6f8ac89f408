"""The keys of a mapping in a recipe's files: those that are known, and those it must have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from audits.errors import RecipeError, unknown_among


def check_keys(plain: Any, place: str, known: tuple[str, ...], *, required: tuple[str, ...] = ()) -> None:
    """Refuse what is not a mapping of known keys.

    Args:
        plain: what a file says.
        place: where it says so, for the message.
        known: the keys there are.
        required: the keys that must be there.

    Raises:
        RecipeError: the text names the place, the key and the nearest known one.
    """
    if not isinstance(plain, Mapping):
        raise RecipeError(f"{place} must be a mapping, not {type(plain).__name__}")
    if unknown := unknown_among(plain, known):
        raise RecipeError(f"{place} has unknown key {unknown}")
    for key in required:
        if key not in plain:
            raise RecipeError(f"{place} lacks the key {key!r}")
