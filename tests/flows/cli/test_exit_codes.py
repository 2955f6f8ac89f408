"""The table of exit codes: what happened, what is counted, and the code."""

from __future__ import annotations

import itertools

import pytest

from audits.outcomes import Outcome
from flows.cli.exit_codes import EXIT_CODES, FailOn, exit_code, exit_code_of

#: failed, newly failed, could not be judged -> the code for newly-failed, fail, inconclusive.
CODES = {
    (False, False, False): (0, 0, 0),
    (False, False, True): (0, 0, 2),
    (True, False, False): (0, 1, 1),
    (True, False, True): (0, 1, 1),
    (True, True, False): (1, 1, 1),
    (True, True, True): (1, 1, 1),
}


@pytest.mark.parametrize(("happened", "codes"), CODES.items())
def test_the_code(happened: tuple[bool, bool, bool], codes: tuple[int, int, int]) -> None:
    failed, newly, unjudged = happened
    for fail_on, code in zip(FailOn, codes, strict=True):
        given = {"failed": failed, "newly_failed": newly, "unjudged": unjudged, "fail_on": fail_on}
        assert exit_code(**given) == code, fail_on
        assert exit_code(**given, exit_zero=True) == 0
    assert exit_code(failed=failed, newly_failed=newly, unjudged=unjudged) == codes[2], "the default counts all"


def test_one_audit_ends_as_its_outcome_says() -> None:
    for outcome, before in itertools.product(Outcome, (None, "pass", "fail", "inconclusive")):
        code = exit_code_of(outcome, before=before, fail_on=FailOn.INCONCLUSIVE, exit_zero=False)
        assert code == EXIT_CODES[outcome]
        newly = exit_code_of(outcome, before=before, fail_on=FailOn.NEWLY_FAILED, exit_zero=False)
        assert newly == (1 if outcome is Outcome.FAIL and before != "fail" else 0)
        assert exit_code_of(outcome, before=before, fail_on=FailOn.FAIL, exit_zero=False) == (outcome is Outcome.FAIL)
        assert exit_code_of(outcome, before=before, fail_on=FailOn.FAIL, exit_zero=True) == 0
