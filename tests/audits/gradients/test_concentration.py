"""A large error of a few elements is never excused as rounding, however small their share of the tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from audits import AuditSettings, Outcome, Recipe, audit
from audits.outcomes import ResultRow


class Spoil(torch.autograd.Function):
    """The identity; the gradient of some elements is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, where: slice, factor: float) -> torch.Tensor:
        ctx.where, ctx.factor = where, factor
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        spoiled = gradient.clone()
        spoiled.view(-1)[ctx.where] *= ctx.factor
        return spoiled, None, None


class Table(nn.Module):
    """Few elements carry nearly all of the gradient; the others' is a millionth of it."""

    def __init__(self, where: slice, factor: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 32))
        weights = torch.full((64, 32), 1e-7)
        weights[:4] = 1.0
        self.register_buffer("importance", weights * torch.rand(64, 32).add(0.5))
        self.where, self.factor = where, factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = Spoil.apply(self.weight, self.where, self.factor)
        return (torch.tanh(weight) * self.importance * x).sum()  # type: ignore[no-any-return]


def row_of(where: slice, factor: float) -> ResultRow:
    model = Table(where, factor)
    recipe = Recipe.capture(
        model,
        batch={"x": torch.ones(())},
        loss=lambda m, b: m(b["x"]),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    )
    settings = AuditSettings(method="probe", checks=("gradient.finite-difference",))
    (row,) = audit(model, recipe, settings=settings, device="cpu").rows
    return row


@pytest.mark.parametrize(
    "where", [slice(1500, 1501), slice(2047, 2048), slice(1024, 1056)], ids=["one element", "the last", "one row"]
)
@pytest.mark.parametrize("factor", [-1.0, 1.5], ids=["flipped", "scaled"])
def test_few_wrong_elements_fail(where: slice, factor: float) -> None:
    row = row_of(where, factor)
    assert row.outcome is Outcome.FAIL
    assert row.parameter == "weight"


@pytest.mark.parametrize("factor", [1.0, 1.0 + 1e-7], ids=["right", "a float32 constant everywhere"])
def test_right_gradients_and_rounding_pass(factor: float) -> None:
    assert row_of(slice(None), factor).outcome is Outcome.PASS
