"""Bugs planted in training on the device: one of each kind and check, caught by name, beside its correct twin."""

from __future__ import annotations

import pytest
import torch

from audits import Recipe
from audits.errors import DeviceError
from audits.live.subject import open_subject
from audits.outcomes import Outcome, ResultRow
from audits.updates import check_registration
from tests.accelerator import NAME
from tests.audits.gradients.cases import Activation, ScaledSwish, Swish, audit, classes, net, outcomes
from tests.audits.gradients.cases import failing as failing_gradients
from tests.wrong_on_purpose.updates import models
from tests.wrong_on_purpose.updates.catalogue import CATALOGUE, Fault
from tests.wrong_on_purpose.updates.faults_registration import Unregistered
from tests.wrong_on_purpose.updates.test_updates_caught import assert_caught

pytestmark = pytest.mark.accelerator

#: The first of each kind and check, and all that mixed precision and several phases can do.
CHOSEN = list({(c.kind, c.check): c for c in reversed(CATALOGUE)}.values())
CHOSEN += [c for c in CATALOGUE if c.kind in ("precision", "phases") and c not in CHOSEN]


@pytest.mark.sampled("case.kind", "case.check", "case.architecture")
@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: f"{case.name} ({case.architecture})")
def test_fault_is_caught_and_its_twin_passes(case: Fault) -> None:
    assert_caught(case, NAME)


@pytest.mark.parametrize("method", ["probe", "exact"])
def test_a_wrong_function_is_named_and_its_right_twin_passes(method: str) -> None:
    torch.manual_seed(0)
    wrong = audit(net(Activation(ScaledSwish)), classes(), method=method, device=NAME)
    assert failing_gradients(wrong) == {"0.weight", "0.bias"}
    assert all("ScaledSwish" in row.message for row in wrong if row.outcome is Outcome.FAIL)
    right = audit(net(Activation(Swish)), classes(), method=method, device=NAME)
    assert set(outcomes(right).values()) == {Outcome.PASS}


def test_layers_in_a_plain_list_stay_behind_and_are_named() -> None:
    torch.manual_seed(0)
    for wrong in (True, False):
        model = Unregistered("list", wrong)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        recipe = Recipe.capture(model, batch=models.mlp()[1], loss=models.classify, optimizer=optimizer)
        if wrong:
            with pytest.raises(DeviceError, match=r"middle\.0\.weight is kept in a plain list"):
                check(model, recipe)
        else:
            assert [row.message for row in check(model, recipe) if row.outcome is Outcome.FAIL] == []


def check(model: torch.nn.Module, recipe: Recipe) -> list[ResultRow]:
    with open_subject(model, recipe, device=NAME) as subject:
        return check_registration(subject)
