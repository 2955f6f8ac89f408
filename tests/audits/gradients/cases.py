"""Small models and the way tests audit them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from audits.gradients import check_gradients
from audits.live.subject import open_subject
from audits.outcomes import Outcome, ResultRow
from audits.recipe.recipe import Recipe
from audits.settings import AuditSettings

FINITE = "gradient.finite-difference"
NATIVE = "gradient.native-dtype"
INPUT = "gradient.input"

_RECIPE_FIELDS = ("stop_gradient", "expect", "mode", "precision", "accumulate", "seed", "phases", "normalize")


def audit(
    model: nn.Module, batch: Any, loss: Any = "cross_entropy", *, device: str = "cpu", **options: Any
) -> list[ResultRow]:
    """Return the rows of a model; options are the recipe's or the settings'."""
    recipe_fields = {key: options.pop(key) for key in list(options) if key in _RECIPE_FIELDS}
    options.setdefault("checks", (FINITE,))
    if "phases" in recipe_fields:
        recipe = Recipe.capture(model, batch=batch, **recipe_fields)
    else:
        held = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(held, lr=0.1)
        recipe = Recipe.capture(model, batch=batch, loss=loss, optimizer=optimizer, **recipe_fields)
    with open_subject(model, recipe, AuditSettings(**options), device=device) as subject:
        return check_gradients(subject)


def outcomes(rows: list[ResultRow], check: str = FINITE) -> dict[str, Outcome]:
    """Return outcome by parameter."""
    return {str(row.parameter): row.outcome for row in rows if row.check == check}


def failing(rows: list[ResultRow], check: str = FINITE) -> set[str]:
    """Return the parameters that fail."""
    return {name for name, outcome in outcomes(rows, check).items() if outcome is Outcome.FAIL}


def classes(count: int = 16, width: int = 8, kinds: int = 3) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(count, width), "y": torch.randint(0, kinds, (count,))}


def net(middle: nn.Module, width: int = 12) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, width), middle, nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))


class Swish(torch.autograd.Function):
    """Right."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def slope(x: torch.Tensor) -> torch.Tensor:
        s = torch.sigmoid(x)
        return s + x * s * (1 - s)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return gradient * Swish.slope(x)


class ScaledSwish(Swish):
    """Wrong by 1 %."""

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return 1.01 * Swish.backward(ctx, gradient)


class FlippedSwish(Swish):
    """Wrong sign."""

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return -Swish.backward(ctx, gradient)


class NegativeSwish(Swish):
    """Wrong for negative inputs only."""

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return Swish.backward(ctx, gradient) * torch.where(x < 0, 1.05, 1.0)


class RowSwish(Swish):
    """Wrong for the first sample only."""

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        out = Swish.backward(ctx, gradient)
        return torch.cat([2 * out[:1], out[1:]])


class TermSwish(Swish):
    """A term of the product rule is missing."""

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return gradient * torch.sigmoid(x)


class Activation(nn.Module):
    """Applies an autograd.Function."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function.apply(x)


class HandLinear(torch.autograd.Function):
    """A linear layer whose bias gradient forgets the sum over all samples but one."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T + bias

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.T @ x, gradient[:-1].sum(0)


class BiasOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(12, 12) / 3), nn.Parameter(torch.zeros(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return HandLinear.apply(x, self.weight, self.bias)
