"""What an audit did not check, and why: each reason once, in a sentence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from audits.outcomes import Outcome, ResultRow


@dataclass(frozen=True)
class Unchecked:
    """Checks that were skipped for one reason.

    Attributes:
        checks: their names.
        reason: why, in a sentence where the rows say one.
        parameters: what it concerns; empty for the whole model.
    """

    checks: tuple[str, ...]
    reason: str
    parameters: tuple[str, ...]


def not_checked(rows: Iterable[ResultRow]) -> list[Unchecked]:
    """Return what was skipped.

    Rows of one check and cause belong together. Their reason is the sentence they share, or else the cause; checks
    with the same reason and parameters are named together.
    """
    by_cause: dict[tuple[str, str], list[ResultRow]] = {}
    for row in rows:
        if row.outcome is Outcome.SKIPPED:
            by_cause.setdefault((row.check, row.cause or row.message), []).append(row)
    by_reason: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (check, cause), members in by_cause.items():
        sentences = {row.message for row in members if row.message}
        names = tuple(dict.fromkeys(row.parameter for row in members if row.parameter))
        by_reason.setdefault((sentences.pop() if len(sentences) == 1 else cause, names), []).append(check)
    return [Unchecked(tuple(dict.fromkeys(checks)), reason, names) for (reason, names), checks in by_reason.items()]
