"""Severities of a team's own."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from audits.checks.severities import with_severities
from audits.outcomes import Outcome, ResultRow, Severity
from audits.settings import AuditSettings
from tests.audits.test_waivers import rows

severities = st.dictionaries(
    st.sampled_from(["gradient.*", "update.rule", "health.dead-relu", "*"]), st.sampled_from(["fail", "warn"])
)


@given(st.lists(rows, max_size=6), severities)
def test_twice_is_once_and_what_was_not_judged_stays_so(members: list[ResultRow], chosen: dict[str, str]) -> None:
    once = with_severities(members, chosen)
    assert with_severities(once, chosen) == once
    for before, after in zip(members, once, strict=True):
        if before.outcome not in (Outcome.FAIL, Outcome.WARN):
            assert after.outcome is before.outcome
        globs = [g for g in chosen if g in ("*", before.check) or (g, before.family) == ("gradient.*", "gradient")]
        assert after.severity == (Severity(chosen[globs[-1]]) if globs else before.severity), "the last that matches"


def test_a_warning_can_fail_and_a_failure_only_warn() -> None:
    warned = ResultRow(check="health.dead-relu", outcome=Outcome.WARN, severity=Severity.WARN)
    failed = ResultRow(check="update.rule", outcome=Outcome.FAIL)
    doubted = ResultRow(check="update.rule", outcome=Outcome.WARN)
    chosen = {"health.*": "fail", "update.rule": "warn"}
    assert [row.counted for row in with_severities([warned, failed], chosen)] == [Outcome.FAIL, Outcome.WARN]
    (kept,) = with_severities([doubted], {"update.rule": "fail"})
    assert kept.outcome is Outcome.WARN, "a check of severity fail that only warned has confirmed nothing"


def test_a_changed_severity_is_another_digest() -> None:
    assert AuditSettings().digest() != AuditSettings(severity={"update.rule": "warn"}).digest()
