"""Names that globs choose: checks, parameters, models; upper and lower case differ on every system."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import Any


def globs_of(declared: Any) -> tuple[str, ...]:
    """Return the globs that somebody declared, as one text or several; nothing for whatever is neither."""
    if isinstance(declared, str):
        return (declared,)
    return tuple(map(str, declared)) if isinstance(declared, (list, tuple, set, frozenset)) else ()


def matches(name: str, declared: Any) -> bool:
    """Whether a name matches the glob, or one of the globs."""
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs_of(declared))


def matching(names: Iterable[str], declared: Any) -> list[str]:
    """Return the names that match the glob, or one of the globs, in their order."""
    globs = globs_of(declared)
    return [name for name in names if matches(name, globs)]
