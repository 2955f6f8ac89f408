"""What an audit holds on its device, counted there: a few bytes a parameter more than training, whatever its size."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

import audits
from audits.gradients import check_gradients
from audits.lanes.separation import find_weighings
from audits.live.subject import open_subject
from audits.outcomes import Outcome
from audits.updates import check_registration, check_updates
from audits.updates.judge import slices
from benchmarks.memory import Peak, train
from tests.accelerator import NAME

pytestmark = pytest.mark.accelerator


class Wide(nn.Module):
    """A dozen tensors of the same size, whose activations are small beside them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(768, 768, bias=False, device=NAME, dtype=dtype) for _ in range(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(batch["x"]).float().square().mean()


def _made(dtype: torch.dtype) -> tuple[nn.Module, dict[str, torch.Tensor], torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Wide(dtype)
    batch = {"x": torch.randn(2, 768, device=NAME).to(dtype), "y": torch.zeros(2, device=NAME)}
    return model, batch, torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_of_a_parameter(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights' working copy is in it; one tensor is 1/12 of all. Slices are small here, as beside a large model."""
    monkeypatch.setattr(slices, "SLICE", 2**14)
    monkeypatch.setattr("audits.lanes.directions.HELD_ELEMENTS", 2**16)
    monkeypatch.setattr("benchmarks.memory.token_loss", loss)
    model, batch, optimizer = _made(dtype)
    peak = Peak(torch.device(NAME))
    train(model, batch, optimizer)
    training = peak.taken()
    del model, optimizer
    gc.collect()

    model, batch, optimizer = _made(dtype)
    recipe = audits.Recipe.capture(model, batch=batch, loss=loss, optimizer=optimizer)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    count = sum(p.numel() for p in model.parameters())
    tensor = count // 12
    taken = {}
    for part in ("gradient", "update"):
        peak = Peak(torch.device(NAME))
        with open_subject(model, recipe, audits.AuditSettings(method="probe"), NAME) as subject:
            find_weighings(subject)
            if part == "gradient":
                rows = check_gradients(subject)
            else:
                rows = [*check_registration(subject), *check_updates(subject)]
        taken[part] = peak.taken()
        assert [r.message for r in rows if r.outcome is Outcome.FAIL] == []
    assert training >= weights  # gradients and the state of AdamW, so that what follows compares with something
    # theta in float64; a tensor's gradient in its backward, and what is worked out of it
    assert taken["gradient"] <= weights + 8 * count + 3 * 8 * tensor
    # what the training step holds, and a tenth more
    assert taken["update"] <= weights + 1.1 * training + tensor * 4
