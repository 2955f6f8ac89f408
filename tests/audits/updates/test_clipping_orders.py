"""Clipping by norms of other orders than the Euclidean one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from audits import Outcome
from tests.audits.updates.subjects import audited, failed, of


def classify(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def rows_of(order: float, *, factor: float = 1.0, dtype: torch.dtype = torch.float32, **recipe: Any) -> Any:
    def step(model: nn.Module, batch: Any, context: Any) -> None:
        context.optimizer.zero_grad()
        (factor * classify(model, batch)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05, norm_type=order)
        context.optimizer.step()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Dropout(0.1), nn.Tanh(), nn.Linear(12, 3)).to(dtype)
    batch = {"x": torch.randn(8, 6, dtype=dtype), "y": torch.arange(8) % 3}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return audited(model, batch=batch, loss=classify, optimizer=optimizer, step=step, **recipe)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, math.inf])
def test_a_gradient_clipped_by_any_norm_is_the_losss_own(order: float, dtype: torch.dtype) -> None:
    rows = rows_of(order, dtype=dtype)
    assert failed(rows) == []
    assert {row.outcome for row in of(rows, "step.gradient")} == {Outcome.PASS}
    assert {row.outcome for row in of(rows, "step.clipping")} == {Outcome.WARN}, "it is not declared"


@pytest.mark.parametrize("order", [2.0, math.inf])
def test_a_wrong_scale_hides_behind_no_norm(order: float) -> None:
    rows = rows_of(order, factor=0.05)  # below the limit: nothing is clipped where the loss's own gradient is
    wrong = [row.message for row in of(rows, "step.gradient") if row.outcome is Outcome.FAIL]
    assert wrong
    assert all("the scale is off by a factor 0.05 before the clipping" in message for message in wrong)


def test_another_norm_than_the_declared_one_fails() -> None:
    rows = of(rows_of(math.inf, clip_grad_norm=0.05), "step.clipping")
    assert {row.outcome for row in rows} == {Outcome.FAIL}
    assert "clipping saw the norm of order inf" in rows[0].message
    assert {row.outcome for row in of(rows_of(2.0, clip_grad_norm=0.05), "step.clipping")} == {Outcome.PASS}
