"""Audits held against each other: what is new, fixed, the same, out of sight; and why."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from audits import Recipe, audit
from audits.errors import InputError
from audits.history.comparison import NOTHING_DIFFERS, Change, compare
from audits.history.reading import (
    committed_audits,
    compare_with_earlier,
    find_audit,
    newest_audit,
    stored_report,
)
from audits.outcomes import Outcome, Severity
from audits.results.store import ResultsStore
from tests.audits.results.committing import PARTS, commit, report, row


@pytest.mark.parametrize(
    ("before", "now", "change"),
    [
        ("pass", "fail", Change.NEW),
        (None, "fail", Change.NEW),
        ("warn", "fail", Change.NEW),
        ("inconclusive", "fail", Change.NEW),
        ("fail", "fail", Change.SAME),
        ("pass", "warn", Change.NEW),
        ("fail", "warn", Change.SAME),
        ("fail", "pass", Change.FIXED),
        ("warn", "pass", Change.FIXED),
        ("inconclusive", "pass", Change.FIXED),
        ("fail", "inconclusive", Change.UNJUDGED),
        ("fail", "skipped", Change.UNJUDGED),
        ("pass", "inconclusive", Change.UNJUDGED),
        ("inconclusive", "inconclusive", Change.SAME),
        ("pass", "pass", None),
        ("pass", "skipped", None),
        ("skipped", "pass", None),
    ],
)
def test_what_becomes_of_a_claim(before: str | None, now: str, change: Change | None) -> None:
    other = row("pass", "other")
    found = compare(report(*([row(before)] if before else []), other), report(row(now), other)).differences
    assert [d.change for d in found] == ([] if change is None else [change])
    if change is not None:
        assert (found[0].before, found[0].now) == (before and Outcome(before), Outcome(now))


def test_a_finding_is_fixed_only_by_a_judgement() -> None:
    before = report(row("fail"), row("pass", "other"))
    silent = compare(before, report(row("pass", "w", check="gradient.input"), row("pass", "other")))
    assert [d.change for d in silent.differences] == [Change.UNJUDGED], "the check said nothing of w this time"
    died = compare(before, report(row("inconclusive", None, check="audit.completed")))
    assert [(d.check, d.change) for d in died.differences if d.check == "update.rule"] == [
        ("update.rule", Change.UNJUDGED)
    ], "an audit that died has not fixed anything"
    removed = compare(before, report(row("pass", "other"), row("pass", None, check="step.mode")))
    assert [d.change for d in removed.differences] == [Change.GONE]


def test_a_check_that_holds_as_a_whole_names_no_parameter() -> None:
    whole = report(row("pass", None), row("pass", "w", check="step.gradient"))
    broken = report(row("fail"), row("pass", "w", check="step.gradient"))
    (new,) = compare(whole, broken).differences
    assert (new.change, new.before) == (Change.NEW, Outcome.PASS)
    assert [d.change for d in compare(broken, whole).differences] == [Change.FIXED]
    half = report(row("pass", None, phase="a"), row("skipped", None, phase="b"), row("pass", check="step.gradient"))
    assert [d.change for d in compare(broken, half).differences] == [Change.UNJUDGED]


def test_the_worst_of_phases_and_lanes_speaks_and_warnings_only_warn() -> None:
    before = report(row("pass", phase="a"), row("fail", phase="b"))
    now = report(row("pass", phase="a"), row("pass", phase="b"))
    assert [d.change for d in compare(before, now).differences] == [Change.FIXED]
    soft = compare(report(row("pass")), report(row("fail", severity=Severity.WARN)))
    assert soft.newly_failed == []
    assert soft.of(Change.NEW)[0].now is Outcome.WARN


@pytest.mark.parametrize(
    ("check", "changed", "cause"),
    [
        ("registration.coverage", {"optimizer": "2", "weights": "2"}, "recipe (optimizer)"),
        ("update.isolation", {"optimizer": "2", "weights": "2"}, "recipe (optimizer); weights differ too"),
        ("gradient.finite-difference", {"files": "2", "weights": "2"},
         "code (the version's files); weights differ too"),
        ("gradient.finite-difference", {"weights": "2"}, "weights"),
        ("gradient.finite-difference", {"batch": "2", "weights": "2", "sources": "2"},
         "code (its modules); recipe and weights differ too"),
        ("update.rule", {}, NOTHING_DIFFERS),
    ],
)  # fmt: skip
def test_the_cause_is_what_the_check_can_depend_on(check: str, changed: dict[str, str], cause: str) -> None:
    now = report(row("fail", check=check), version=2, parts={**PARTS, **changed})
    assert compare(report(row("pass", check=check)), now).differences[0].cause == cause


def test_the_environment_is_a_cause_and_older_audits_name_what_they_know() -> None:
    moved = dataclasses.replace(report(row("fail")).identity, torch="2.14.0", device="H100")
    now = dataclasses.replace(report(row("fail")), identity=moved)
    assert compare(report(row("pass")), now).differences[0].cause == "environment (torch, device)"
    old = report(row("pass"), parts={}, model_digest="1", recipe_digest="1")
    new = report(row("fail"), parts={}, model_digest="2", recipe_digest="2")
    assert compare(old, new).cause == "weights or code, recipe"


def test_parts_tell_what_of_a_live_audit_changed() -> None:
    def parts(model: nn.Module, *, lr: float = 0.1, loss: str = "mse_loss", scale: float = 1.0) -> dict[str, str]:
        batch = {"inputs": scale * torch.ones(2, 3), "targets": torch.ones(2, 1)}
        recipe = Recipe.capture(model, batch=batch, loss=loss, optimizer=torch.optim.SGD(model.parameters(), lr=lr))
        return dict(audit(model, recipe).parts)

    torch.manual_seed(0)
    base = parts(nn.Linear(3, 1))

    def differing(other: dict[str, str]) -> set[str]:
        assert other.keys() == base.keys()
        return {name for name in base if base[name] != other[name]}

    assert differing(parts(nn.Linear(3, 1))) == set(), "other weights alone are not the recipe's"
    assert differing(parts(nn.Linear(3, 1), lr=0.2)) == {"optimizer"}
    assert differing(parts(nn.Linear(3, 1), loss="l1_loss")) == {"loss"}
    assert differing(parts(nn.Linear(3, 1), scale=2.0)) == {"batch"}
    assert "sources" in differing(parts(nn.Sequential(nn.Linear(3, 1))))


def test_a_stored_audit_comes_back_as_it_was(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path)
    made = report(row("fail", error=0.5, step=2, seed=7), row("pass", None), row("skipped", "q", cause="canonical"))
    commit(store, made)
    back = stored_report(store, newest_audit(store, "m", 1))
    assert back.rows == made.rows
    assert (back.identity, back.coverage_of, back.parts) == (made.identity, made.coverage_of, made.parts)
    assert (back.outcome, back.run_id, back.limits, back.seconds) == (Outcome.FAIL, "r", ("no step",), 1.5)
    assert find_audit(store, "m-1")["audit_id"] == "m-1-31-2"


def test_since_holds_against_the_same_version_and_the_version_before(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path)
    commit(store, report(row("pass"), hour=1))
    commit(store, report(row("fail"), hour=2))
    commit(store, report(row("inconclusive", None, check="audit.completed"), version=2, hour=3))
    commit(store, report(row("pass"), version=3, hour=4))
    now = report(row("fail"), version=3, hour=5, parts={**PARTS, "optimizer": "2"})
    commit(store, now)
    since = compare_with_earlier(store, now)
    assert since.audit is not None
    assert since.version is not None
    assert [d.parameter for d in since.audit.newly_failed] == ["w"]
    assert since.version.before.identity.model_version == 1, "version 2 was never judged"
    assert [d.change for d in since.version.differences] == [Change.SAME]
    first = compare_with_earlier(store, report(row("fail"), hour=0))
    assert (first.audit, first.version) == (None, None)
    compared = compare(*(stored_report(store, newest_audit(store, "m", version)) for version in (1, 3)))
    assert compared.before.identity.audit_id == "m-1-31-2"
    assert len(committed_audits(store, "m")) == 5


def test_what_is_not_there_is_said_with_what_is(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path)
    with pytest.raises(InputError, match=r"there is no audit in .* yet"):
        newest_audit(store, "m", 1)
    commit(store, report(row("pass")))
    with pytest.raises(InputError, match=r"m v7 has no audit in .*; of this model it has v1"):
        newest_audit(store, "m", 7)
    with pytest.raises(InputError, match=r"no audit of 'n' in .*; it has m"):
        newest_audit(store, "n", 1)
    with pytest.raises(InputError, match="no audit whose id begins with 'zz'"):
        find_audit(store, "zz")
