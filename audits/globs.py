"""Globs as people declare them: one, or a sequence of them."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence


def matches(name: str, globs: object) -> bool:
    """Whether a parameter's name matches one of the declared globs (a string, or a sequence of them)."""
    if not globs:
        return False
    patterns: Sequence[str] = (globs,) if isinstance(globs, str) else tuple(globs)  # type: ignore[arg-type]
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
