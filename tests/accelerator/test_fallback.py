"""A loss that makes tensors on the CPU: audited there where the device was ours to choose, else refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import audits
from audits import devices
from audits.live import subject
from tests.accelerator import NAME

pytestmark = pytest.mark.accelerator


def noisy(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.mse_loss(model(batch["x"] + 0.1 * torch.randn(4, 3)), batch["y"])


def captured() -> tuple[nn.Module, audits.Recipe]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    batch = {"x": torch.randn(4, 3), "y": torch.randn(4, 2)}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return model, audits.Recipe.capture(model, batch=batch, loss=noisy, optimizer=optimizer)


def test_a_device_that_was_asked_for_is_not_swapped() -> None:
    model, recipe = captured()
    with pytest.raises(audits.RecipeError, match=r"makes tensors on another device than .*device='cpu'"):
        audits.audit(model, recipe, device=NAME)


def test_auto_goes_on_where_the_loss_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, recipe = captured()
    choose = devices.choose_device
    monkeypatch.setattr(subject, "choose_device", lambda device: choose(NAME if device == "auto" else device))
    report = audits.audit(model, recipe)
    assert (report.outcome, report.coverage, report.identity.device) == (audits.Outcome.PASS, 1.0, "cpu")
    assert "Audited on the CPU, though there is a GPU: the loss of phase 'step' makes tensors" in report.headline
