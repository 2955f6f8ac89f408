"""What every check is, and nothing that runs: one file a family, one declaration a check.

To add a check: write its `Check` in its family's file, name it in that file's ``CHECKS``, and let the code that judges
read its thresholds there.
"""

from __future__ import annotations

from collections.abc import Iterable

from audits.checks import buffers, gradient, health, optimizer, registration, step, update, version
from audits.checks.check import Check
from audits.errors import InputError, SettingsError, suggest
from audits.globs import matching

_FAMILIES = (gradient, registration, step, update, optimizer, buffers, health, version)

#: Every check there is, by name.
CHECKS: dict[str, Check] = {check.name: check for family in _FAMILIES for check in family.CHECKS}


def find_check(name: str) -> Check:
    """Return the check of that name.

    Raises:
        InputError: there is none; the text suggests the nearest.
    """
    if name not in CHECKS:
        raise InputError(f"there is no check {name!r}{suggest(name, CHECKS)} (`gradaudit checks` lists them)")
    return CHECKS[name]


def refuse_unknown_checks(globs: Iterable[str]) -> None:
    """Refuse names and globs that no check has: what looks at nothing finds nothing.

    Raises:
        SettingsError: the text names the glob and the nearest check.
    """
    for glob in globs:
        if not matching(CHECKS, glob):
            raise SettingsError(f"there is no check {glob!r}{suggest(glob, CHECKS)} (`gradaudit checks` lists them)")
