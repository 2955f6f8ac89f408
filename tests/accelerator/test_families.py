"""Families of correct models on the device: what the CPU says, and no false alarm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import audits
from audits.recipe.callables import CallableReference, as_loss
from audits.structures import map_tensors
from benchmarks.models.correct import FAMILIES
from tests.accelerator import NAME
from tests.accelerator.comparing import both, failing

pytestmark = [
    pytest.mark.accelerator,
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
]

#: The update audit's own findings on the CPU too: renormalising an embedding in its forward writes its weight.
RENORMALISED = "limited.weight was written outside optimizer.step"


def held(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.sampled(cases=9)
@pytest.mark.parametrize("name", FAMILIES)
def test_says_what_the_cpu_says(name: str) -> None:
    """The model is made on the CPU; the audit brings it to the device and back."""

    def build() -> tuple[nn.Module, dict[str, Any]]:
        model, batch, loss = FAMILIES[name]()
        return model, {"batch": batch, "loss": loss, "optimizer": torch.optim.SGD(held(model), lr=0.1)}

    report = both(build)
    known = ("health checks stopped", RENORMALISED)  # as on the CPU: compared above
    assert [text for text in failing(report) if not any(part in text for part in known)] == []


@pytest.mark.sampled(cases=6)
@pytest.mark.parametrize("name", FAMILIES)
def test_trained_there_with_its_state(name: str) -> None:
    """The model is made and trained on the device, and the optimizer's state is captured there."""
    torch.manual_seed(2)
    model, batch, loss = FAMILIES[name]()
    model, batch = model.to(NAME), map_tensors(batch, lambda t: t.to(NAME))
    optimizer: torch.optim.Optimizer = torch.optim.SGD(held(model), lr=1e-3, momentum=0.9)
    if name != "embeddings":  # AdamW takes no sparse gradients
        optimizer = torch.optim.AdamW(held(model), lr=1e-3)
    function = as_loss(CallableReference.of(loss, role="loss"))
    for _ in range(2):
        optimizer.zero_grad()
        function(model, batch).backward()
        optimizer.step()
    recipe = audits.Recipe.capture(model, batch=batch, loss=loss, optimizer=optimizer)
    report = audits.audit(model, recipe, device=NAME)
    wrong = [r.message for r in report.rows if r.outcome is audits.Outcome.FAIL and r.cause != "environment"]
    assert [text for text in wrong if RENORMALISED not in text] == []
