"""Where float64's own vector-Jacobian product has a pole, the native kernel is judged by the other elements."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from audits import AuditSettings, Outcome, Recipe, audit


class WrongLog(torch.autograd.Function):
    """A logarithm whose float32 backward is half of what it should be."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.log()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return gradient / x * (0.5 if x.dtype is torch.float32 else 1.0)


class Bucketed(nn.Module):
    """A logarithm at 0 whose result is thrown away, as relative position buckets do."""

    def __init__(self, log: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.log = log

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        distances = self.linear(x).abs().flatten() + 0.1
        return self.log(torch.cat([torch.zeros(1), distances]))[1:].mean()  # type: ignore[no-any-return]


def outcomes(log: Any) -> list[tuple[str, Outcome]]:
    model = Bucketed(log)
    recipe = Recipe.capture(
        model,
        batch={"x": torch.randn(5, 4)},
        loss=lambda m, b: m(b["x"]),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    )
    report = audit(model, recipe, settings=AuditSettings(checks=("gradient.native-dtype",)), device="cpu")
    return [(row.message, row.outcome) for row in report.rows]


def test_a_pole_in_float64_too_is_no_finding() -> None:
    found = outcomes(torch.log)
    assert any("log" in message for message, _ in found)
    assert {outcome for _, outcome in found} <= {Outcome.PASS, Outcome.SKIPPED}


def test_a_wrong_kernel_beside_a_pole_still_fails() -> None:
    assert any(
        outcome is Outcome.FAIL and "WrongLog" in message for message, outcome in outcomes(lambda x: WrongLog.apply(x))
    )
