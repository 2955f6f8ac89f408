"""Exit codes: of verdicts, of the verdicts a command is asked to tell, and of refused attestations."""

from __future__ import annotations

import enum
from collections.abc import Collection

from audits.outcomes import Outcome

EXIT_CODES = {Outcome.PASS: 0, Outcome.WARN: 0, Outcome.FAIL: 1, Outcome.INCONCLUSIVE: 2, Outcome.SKIPPED: 2}

#: What ``gradaudit verify`` ends with when it believes an attestation not, by why (`registry_models.attestation`).
REFUSAL_CODES = {"signature": 3, "key": 4, "foreign": 5, "expired": 6, "kind": 7}

#: The exit code of what could not be judged, or not be carried out.
NOT_JUDGED = 2


class FailOn(enum.StrEnum):
    """What ends a command with another code than 0, each with what stands before it."""

    NEWLY_FAILED = "newly-failed"
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"


def exit_code(
    *, failed: bool, newly_failed: bool, unjudged: bool, fail_on: FailOn = FailOn.INCONCLUSIVE, exit_zero: bool = False
) -> int:
    """Return the exit code of verdicts.

    Args:
        failed: something fails.
        newly_failed: something fails that did not before.
        unjudged: something could not be judged, and nobody excused it.
        fail_on: what counts.
        exit_zero: nothing counts.
    """
    if exit_zero:
        return 0
    if newly_failed if fail_on is FailOn.NEWLY_FAILED else failed:
        return EXIT_CODES[Outcome.FAIL]
    return NOT_JUDGED if unjudged and fail_on is FailOn.INCONCLUSIVE else 0


def exit_code_of(outcome: Outcome, *, before: str | None, fail_on: FailOn, exit_zero: bool) -> int:
    """Return the exit code of one audit.

    Args:
        outcome: what it came to.
        before: what the version's earlier audit came to, or that of the version before it; None without any.
        fail_on: what counts.
        exit_zero: nothing counts.
    """
    return exit_code(
        failed=outcome is Outcome.FAIL,
        newly_failed=outcome is Outcome.FAIL and before != Outcome.FAIL,
        unjudged=EXIT_CODES[outcome] == NOT_JUDGED,
        fail_on=fail_on,
        exit_zero=exit_zero,
    )


def unexcused(unjudged: Collection[str], excused: Collection[str]) -> list[str]:
    """Return what could not be judged and nobody excused."""
    return [reference for reference in unjudged if reference not in set(excused)]
