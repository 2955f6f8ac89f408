"""Which failures stand: those that show again, with a second seed or, for a first call's, in a fresh process.

A failure that neither a second seed nor repeats of its own seed show again is chance, or the first call's (autotuning
that repeats an in-place kernel, late initialisation, a cache). Only another process can tell, whose first call is a
first call again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from audits.causes import Cause
from audits.outcomes import Outcome, ResultRow, Severity

#: Repeats without a failure before the first call is suspected. What fails at random with probability p passes for a
#: first call, here and in a fresh process, with p^2 (1 - p)^8 at the most: 0.7 % at p = 0.2.
REPEATS = 4

Key = tuple[str, str | None, str | None]
Rows = list[ResultRow]


def key_of(r: ResultRow) -> Key:
    """Return what makes two rows the same finding: check, phase and parameter."""
    return r.check, r.phase, r.parameter


def confirmed(rows: Rows, run: Callable[[int], Rows], seed: int, second_seed: int) -> Rows:
    """Let a failure stand only where a second seed fails it too; tell what repeats of the first seed say of the others.

    Args:
        rows: of the first run.
        run: seed -> rows of another run.
        seed: of the first run.
        second_seed: of the run that confirms.
    """
    if not any(fails(r) for r in rows):
        return rows
    again = failing(run(second_seed))
    open_ = {key_of(r) for r in rows if r.outcome is Outcome.FAIL} - again
    shown: set[Key] = set()
    for _ in range(REPEATS):
        if open_ <= shown:
            break
        shown |= failing(run(seed)) & open_
    text = "a second seed did not show it"
    return [
        r if r.outcome is not Outcome.FAIL or key_of(r) in again
        else opened(r, Cause.NOT_REPRODUCED, text) if key_of(r) in shown
        else opened(r, Cause.FIRST_CALL, f"{text}, nor did {REPEATS} repeats of this one")
        for r in rows
    ]  # fmt: skip


def fails(r: ResultRow) -> bool:
    """Whether the row would fail the version."""
    return r.outcome is Outcome.FAIL and r.severity is Severity.FAIL


def failing(rows: Iterable[ResultRow]) -> set[Key]:
    """Return the findings that fail."""
    return {key_of(r) for r in rows if r.outcome is Outcome.FAIL}


def opened(r: ResultRow, cause: str, text: str) -> ResultRow:
    """Return the failure as an open question, with its cause and a last clause."""
    return dataclasses.replace(r, outcome=Outcome.INCONCLUSIVE, cause=cause, message=f"{r.message}; {text}")
