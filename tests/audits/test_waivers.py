"""Waivers: what they may excuse, what never, and what makes a version due again."""

from __future__ import annotations

import dataclasses
import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audits.errors import SettingsError
from audits.outcomes import WORST_FIRST, Coverage, Outcome, ResultRow, Severity
from audits.report import AuditReport
from audits.results.format import AuditIdentity
from audits.waivers import Waiver, excuses, standing, unmatched, waived, waivers_from_plain

TODAY = datetime.date(2026, 6, 1)
CHECKS = ("gradient.finite-difference", "update.rule", "registration.coverage", "health.dead-relu")

rows = st.builds(
    ResultRow,
    check=st.sampled_from(CHECKS),
    outcome=st.sampled_from(list(Outcome)),
    severity=st.sampled_from(list(Severity)),
    parameter=st.sampled_from([None, "a.weight", "b.weight"]),
    message=st.sampled_from(["", "off.", "off"]),
)
waivers = st.builds(
    Waiver,
    model=st.sampled_from(["m", "m*", "*", "other"]),
    check=st.sampled_from(["*", "gradient.*", *CHECKS]),
    reason=st.just("known"),
    owner=st.sampled_from(["anna", "bert"]),
    expires=st.dates(datetime.date(2026, 5, 28), datetime.date(2026, 6, 5)),
    versions=st.sampled_from(["", "1", ">=2", ">=1,<7"]),
    parameter=st.sampled_from(["*", "a.*", "nothing"]),
)


def report(members: list[ResultRow], model: str = "m", version: int = 1, coverage: float = 1.0) -> AuditReport:
    who = AuditIdentity(audit_id="a", model_name=model, model_version=version)
    return AuditReport(tuple(members), Coverage(coverage, coverage, ()), identity=who)


def waiver(**values: object) -> Waiver:
    plain = {"model": "m", "check": "update.rule", "reason": "known", "owner": "anna", "expires": TODAY}
    return Waiver(**{**plain, **values})  # type: ignore[arg-type]


@given(st.lists(rows, max_size=8), st.lists(waivers, max_size=5), st.sampled_from([0.5, 1.0]))
def test_a_waiver_never_makes_anything_worse_and_never_excuses_what_was_not_judged(
    members: list[ResultRow], some: list[Waiver], coverage: float
) -> None:
    before, after = report(members, coverage=coverage), waived(report(members, coverage=coverage), some, TODAY)
    rank = WORST_FIRST.index
    assert rank(after.outcome) >= rank(before.outcome) or before.outcome is Outcome.FAIL
    if after.outcome is not before.outcome:
        assert before.outcome is Outcome.FAIL
        assert after.outcome in (Outcome.WARN, Outcome.INCONCLUSIVE), "what is waived is never simply a pass"
    assert [r.outcome for r in after.rows] == [r.outcome for r in before.rows], "the finding itself stays"
    assert set(after.failed_checks) <= set(before.failed_checks)
    assert all(row.waiver is None for row in after.rows if row.outcome not in (Outcome.FAIL, Outcome.WARN))
    assert waived(after, [w for w in some if w.holds(TODAY)], TODAY).rows == after.rows or any(
        not w.holds(TODAY) for w in some
    )


@given(st.lists(rows, max_size=8), st.lists(waivers, max_size=5))
def test_other_models_and_other_versions_are_never_touched(members: list[ResultRow], some: list[Waiver]) -> None:
    about_others = [w for w in some if not w.covers("m", 1)]
    before = report(members)
    assert waived(before, about_others, TODAY) == before
    assert standing(about_others, "m", 1, TODAY) == ""


@given(st.lists(rows, max_size=8), st.lists(waivers, max_size=5))
def test_every_waiver_in_force_is_used_or_said_to_match_nothing(members: list[ResultRow], some: list[Waiver]) -> None:
    after = waived(report(members), some, TODAY)
    idle = {w.id for w in unmatched(some, [("m", 1, after.waivers)], TODAY)}
    holding = {w.id for w in some if w.holds(TODAY) and w.covers("m", 1)}
    assert idle | set(after.waivers) == holding
    assert not idle & set(after.waivers)


FAILED = ResultRow(check="update.rule", outcome=Outcome.FAIL, parameter="a.weight", message="moved twice")


def test_a_waiver_holds_through_its_last_day_and_then_the_finding_fails_again_and_names_it() -> None:
    one = waiver(expires=TODAY)
    (row,) = waived(report([FAILED]), [one], TODAY).rows
    assert (row.counted, row.waiver) == (Outcome.WARN, "known (anna, until 2026-06-01)")
    tomorrow = TODAY + datetime.timedelta(days=1)
    after = waived(report([FAILED]), [one], tomorrow)
    assert after.outcome is Outcome.FAIL
    assert after.rows[0].waiver is None
    assert after.rows[0].message == "moved twice. Its waiver by anna (known) expired on 2026-06-01."
    assert standing([one], "m", 1, TODAY) != standing([one], "m", 1, tomorrow), "an end makes the version due"


def test_a_waiver_that_an_audited_process_writes_itself_counts_for_nothing() -> None:
    forged = dataclasses.replace(FAILED, waiver="trust me")
    assert report([forged]).outcome is not Outcome.FAIL
    assert waived(report([forged]), [], TODAY).outcome is Outcome.FAIL


def test_a_waived_finding_is_said_to_be_waived() -> None:
    passing = [
        ResultRow(check="registration.coverage", outcome=Outcome.PASS),
        ResultRow(check="gradient.finite-difference", outcome=Outcome.PASS, parameter="a.weight"),
    ]
    after = waived(report([*passing, FAILED]), [waiver()], TODAY)
    assert after.headline.startswith(
        "PASS WITH WARNINGS: the update does not follow its rule: a.weight (update.rule, waived);"
    )
    assert after.counts["fail"] == 0
    assert after.counts["warn"] == 1
    assert after.to_dict()["findings"][0]["waiver"] == "known (anna, until 2026-06-01)"
    assert after.to_frame()["waiver"].dropna().tolist() == ["known (anna, until 2026-06-01)"]


ENTRY = {"model": "m", "check": "update.rule", "reason": "known", "owner": "anna", "expires": "2026-06-01"}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"owner": None}, "waiver 1 lacks owner"),
        ({"ownr": "x"}, "unknown key 'ownr'; did you mean 'owner'?"),
        ({"check": "update.rul"}, "no check 'update.rul'; did you mean 'update.rule'?"),
        ({"expires": "soon"}, "expires must be a day such as 2027-01-31, not 'soon'"),
        ({"versions": "3-5"}, "versions '3-5' is not a range of versions; write one number, or for example '>=3,<7'"),
    ],
)
def test_an_impossible_waiver_is_refused_with_its_place_and_its_cure(change: dict[str, object], text: str) -> None:
    with pytest.raises(SettingsError) as raised:
        waivers_from_plain({"waivers": [ENTRY | change]}, source="waivers.yaml")
    assert text in str(raised.value)
    assert "waivers.yaml, waiver 1" in str(raised.value)


def test_a_range_of_versions() -> None:
    one = waiver(versions=">=3,<7")
    assert [v for v in range(1, 9) if one.covers("m", v)] == [3, 4, 5, 6]
    assert [v for v in range(1, 9) if waiver(versions="3").covers("m", v)] == [3]


@pytest.mark.parametrize(
    ("values", "holds"),
    [
        ({"check": "audit.completed"}, True),
        ({"check": "audit.*"}, True),
        ({"check": "update.rule"}, False),
        ({"check": "audit.completed", "model": "other"}, False),
        ({"check": "audit.completed", "versions": ">=2"}, False),
        ({"check": "audit.completed", "expires": TODAY - datetime.timedelta(days=1)}, False),
    ],
)
def test_a_waiver_of_the_audit_itself_excuses_a_night_and_changes_no_outcome(
    values: dict[str, object], holds: bool
) -> None:
    one = waiver(**values)
    assert excuses([one], "m", 1, TODAY) == ([one] if holds else [])
    row = ResultRow(check="audit.completed", outcome=Outcome.INCONCLUSIVE, severity=Severity.FAIL, message="no.")
    assert waived(report([row]), [one], TODAY).outcome is Outcome.INCONCLUSIVE
