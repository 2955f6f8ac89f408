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


class Masked(nn.Module):
    """An additive mask made of zeros and the dtype's least number, as transformers make it."""

    def __init__(self, times: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.times = times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        keep = torch.tensor([1.0, 1.0, 0.0, 1.0])
        mask = self.times(1.0 - keep, torch.finfo(torch.float32).min)
        return (self.linear(x) + mask).softmax(-1)[:, 0].mean()  # type: ignore[no-any-return]


class WrongTimes(torch.autograd.Function):
    """A product whose float32 backward is half of what it should be where it is no infinity."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x * factor

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * ctx.factor * (0.5 if gradient.dtype is torch.float32 else 1.0), None


def masked(times: Any) -> list[tuple[str, Outcome]]:
    model = Masked(times)
    recipe = Recipe.capture(
        model, batch={"x": torch.randn(5, 4)}, loss=lambda m, b: m(b["x"]),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    )  # fmt: skip
    report = audit(model, recipe, settings=AuditSettings(checks=("gradient.native-dtype",)), device="cpu")
    return [(row.message, row.outcome) for row in report.rows]


def test_a_product_that_rightly_rounds_to_infinity_is_no_finding() -> None:
    torch.manual_seed(0)
    found = masked(torch.mul)
    assert any("mul" in message for message, _ in found)
    assert {outcome for _, outcome in found} <= {Outcome.PASS, Outcome.SKIPPED}


def test_a_wrong_kernel_beside_an_infinity_still_fails() -> None:
    torch.manual_seed(0)
    found = masked(lambda x, factor: WrongTimes.apply(x, factor))
    assert any(outcome is Outcome.FAIL and "WrongTimes" in message for message, outcome in found)
