"""Ages and spans of time as people write them on a command line."""

from __future__ import annotations

import datetime
import re

from audits.errors import SettingsError

#: Ages as people write them: a number and its unit.
_AGE = re.compile(r"(\d+(?:\.\d+)?)([mhd])")
_UNITS = {"m": "minutes", "h": "hours", "d": "days"}


def age_of(text: str, option: str) -> datetime.timedelta:
    """Return the time that ``30m``, ``12h`` or ``7d`` says.

    Raises:
        SettingsError: the text says none.
    """
    found = _AGE.fullmatch(text.strip())
    try:
        if found is not None:
            return datetime.timedelta(**{_UNITS[found[2]]: float(found[1])})
    except OverflowError:
        pass
    raise SettingsError(f"{option} {text}: write a number with its unit, such as 30m, 12h or 7d")
