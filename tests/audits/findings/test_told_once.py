"""What a report says of a model captured in eval mode, and of gradients that are zero only at the start."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from audits import Outcome, Recipe, audit
from benchmarks.models.correct import FAMILIES

BATCH = {"x": torch.randn(8, 6), "y": torch.randint(0, 3, (8,))}


def audited(model: nn.Module, batch: Any = None, loss: Any = "cross_entropy", **options: Any) -> Any:
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3)
    recipe = Recipe.capture(model, batch=batch or BATCH, loss=loss, optimizer=optimizer, **options)
    return audit(model, recipe, device="cpu")


class Own(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if self.training else x


@pytest.mark.slow
@pytest.mark.parametrize("middle", [nn.Dropout(0.1), nn.BatchNorm1d(6), Own()])
def test_a_model_captured_in_eval_mode_is_named(middle: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(6, 6), middle, nn.Linear(6, 3))
    assert "eval mode" not in audited(model).headline
    model.eval()
    report = audited(model)
    assert not report.failed_checks
    assert report.limits
    assert "was in eval mode when the recipe was captured" in report.headline
    assert "eval mode when" not in audited(model, mode="eval").headline
    model.train()
    middle.eval()
    assert "eval mode when" not in audited(model).headline, "remembered, and audited in eval mode"


def test_a_model_without_modes_has_nothing_to_say() -> None:
    assert not audited(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)).eval()).limits


@pytest.mark.slow
def test_zero_gradients_that_the_start_explains_are_one_note() -> None:
    model, batch, loss = FAMILIES["lora_initial"]()
    report = audited(model, batch, loss)
    assert not [r for r in report.rows if r.outcome is Outcome.WARN]
    row = next(r for r in report.rows if r.check == "health.all-zero" and "and 1 more start" in r.message)
    assert (row.outcome, row.cause) == (Outcome.SKIPPED, "zero at the start")
    assert "nothing needs doing" in row.message
    assert "0.a, 2.a, 4.a and 1 more" in row.message
    assert "0.b, 2.b, 4.b and 1 more start at zero" in row.message
    assert {r.parameter for r in report.rows if r.outcome is Outcome.SKIPPED and r.cause == row.cause} == {
        "0.a", "2.a", "4.a", "6.a",
    }  # fmt: skip


class Dead(nn.Module):
    """Zero twice over: neither factor ever gets a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.a, self.b = nn.Linear(6, 3), nn.Linear(6, 4, bias=False), nn.Linear(4, 3, bias=False)
        for layer in (self.a, self.b):
            nn.init.zeros_(layer.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) + self.b(self.a(x))  # type: ignore[no-any-return]


def test_zero_gradients_that_stay_are_not_explained_away() -> None:
    rows = audited(Dead()).rows
    zero = {r.parameter for r in rows if r.check == "health.all-zero" and r.outcome is Outcome.WARN}
    assert zero == {"a.weight", "b.weight"}
    assert not [r for r in rows if r.cause == "zero at the start"]
