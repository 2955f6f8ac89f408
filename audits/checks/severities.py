"""Severities of a team's own: what an unmet claim does to the version, by check."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from audits.errors import SettingsError, suggest
from audits.globs import matches, matching
from audits.outcomes import Outcome, ResultRow, Severity


def with_severities(rows: Iterable[ResultRow], severities: Mapping[str, str]) -> list[ResultRow]:
    """Return the rows under these severities; to apply them twice changes nothing more.

    A failure of a check that only warns becomes a warning; a warning that a check of severity warn gave becomes a
    failure when the check is to fail. What could not be judged stays so.

    Args:
        rows: an audit's rows.
        severities: glob of check names -> ``fail`` or ``warn``; the last that matches counts.
    """
    if not severities:
        return list(rows)
    chosen: dict[str, Severity | None] = {}
    result = []
    for row in rows:
        if row.check not in chosen:
            matching = [value for glob, value in severities.items() if matches(row.check, glob)]
            chosen[row.check] = Severity(matching[-1]) if matching else None
        severity = chosen[row.check]
        result.append(row if severity is None else _under(severity, row))
    return result


def _under(severity: Severity, row: ResultRow) -> ResultRow:
    outcome = row.outcome
    if severity is Severity.WARN and outcome is Outcome.FAIL:
        outcome = Outcome.WARN
    elif severity is Severity.FAIL and row.severity is Severity.WARN and outcome is Outcome.WARN:
        outcome = Outcome.FAIL
    return dataclasses.replace(row, severity=severity, outcome=outcome)


def refuse_unknown(severities: Mapping[str, str]) -> None:
    """Refuse what is no severity and globs that match no check.

    Raises:
        SettingsError: the text names the entry and the nearest check.
    """
    from audits.checks import CHECKS

    for glob, value in severities.items():
        if value not in tuple(Severity):
            raise SettingsError(f"severity of {glob!r}: {value!r} is neither 'fail' nor 'warn'")
        if not matching(CHECKS, glob):
            raise SettingsError(
                f"severity of {glob!r}: no check has this name{suggest(glob, CHECKS)} (`gradaudit checks` lists them)"
            )
