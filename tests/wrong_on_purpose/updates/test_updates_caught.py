"""Every planted fault is caught by the check that should, naming the parameter; every correct twin passes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from audits.live.subject import open_subject
from audits.outcomes import Outcome, ResultRow
from audits.recipe.recipe import Recipe
from audits.updates import check_registration, check_updates
from tests.wrong_on_purpose.updates.catalogue import CATALOGUE, Fault


def audit(case: Fault, wrong: bool, device: str = "cpu") -> list[ResultRow]:
    model, arguments, *later = case.build(wrong)
    recipe = Recipe.capture(model, **arguments)
    for change in later:
        change(model)
    with open_subject(model, recipe, device=device) as subject:
        return check_registration(subject) + check_updates(subject)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_caught(case: Fault, device: str = "cpu") -> None:
    right = audit(case, wrong=False, device=device)
    assert [r.message for r in right if r.outcome is Outcome.FAIL] == []
    if case.outcome == "warn":
        assert [r.message for r in right if r.check == case.check and r.outcome is Outcome.WARN] == []
    wrong = audit(case, wrong=True, device=device)
    hits = [r for r in wrong if r.check == case.check and r.outcome.value == case.outcome]
    assert hits, [(r.check, r.outcome.value, r.parameter, r.message) for r in wrong if r.outcome is not Outcome.PASS]
    if case.parameter is not None:
        assert case.parameter in {r.parameter for r in hits}
        assert all(case.parameter in r.message for r in hits if r.parameter == case.parameter)


@pytest.mark.parametrize("case", CATALOGUE, ids=lambda case: f"{case.name} ({case.architecture})")
def test_fault_is_caught_and_its_twin_passes(case: Fault) -> None:
    assert_caught(case)


def test_catalogue_is_wide_enough() -> None:
    assert len(CATALOGUE) >= 80
    assert len({case.architecture.partition(",")[0] for case in CATALOGUE}) >= 4
    assert {case.kind for case in CATALOGUE} >= {"rule", "registration", "step", "phases", "persistence", "precision"}
    assert max(Counter((c.name, c.architecture) for c in CATALOGUE).values()) == 1
