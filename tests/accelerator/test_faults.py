"""Bugs planted in training on the device: one of each kind and check, caught by name, beside its correct twin."""

from __future__ import annotations

import pytest
import torch

from audits.outcomes import Outcome
from tests.accelerator import NAME
from tests.audits.gradients.cases import Activation, ScaledSwish, Swish, audit, classes, net, outcomes
from tests.audits.gradients.cases import failing as failing_gradients
from tests.wrong_on_purpose.updates.catalogue import CATALOGUE, Fault
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
