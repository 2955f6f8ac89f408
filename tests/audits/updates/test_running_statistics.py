"""BatchNorm's running statistics: what torch's kernels round is allowed, what moves them besides is found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from audits import AuditSettings, Outcome, Recipe
from audits.live.subject import open_subject
from audits.updates import check_updates

CHECK = "buffers.batch-norm"


class Normed(nn.Module):
    """BatchNorm on pictures; `off` multiplies the running variance in the forward."""

    def __init__(self, momentum: float, off: float = 1.0) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(4, momentum=momentum), nn.Linear(4, 3)
        self.off = off

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.norm(x)
        if self.off != 1.0 and self.norm.training:
            self.norm.running_var.data.mul_(self.off)  # type: ignore[union-attr]
        return self.head(out.square().mean((2, 3)))


def found(model: nn.Module, x: torch.Tensor) -> set[Outcome]:
    recipe = Recipe.capture(
        model, batch={"x": x, "y": torch.randint(0, 3, (len(x),))}, loss="cross_entropy",
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    )  # fmt: skip
    with open_subject(model, recipe, AuditSettings(), device="cpu") as subject:
        return {r.outcome for r in check_updates(subject) if r.check == CHECK}


@pytest.mark.parametrize("momentum", [0.1, 0.9997, None])
@pytest.mark.parametrize("kind", ["plain", "channels_last", "small variance"])
def test_what_the_kernel_rounds_is_no_finding(kind: str, momentum: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 4, 64, 64)
    x = x.to(memory_format=torch.channels_last) if kind == "channels_last" else x
    x = x * 1e-2 if kind == "small variance" else x
    assert found(Normed(momentum), x) == {Outcome.PASS}
    assert found(Normed(momentum, off=1.001), x) == {Outcome.FAIL}


def test_float64_statistics_are_held_to_float64() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 4, 16, 16, dtype=torch.float64)
    assert found(Normed(0.1).double(), x) == {Outcome.PASS}
    assert found(Normed(0.1, off=1 + 1e-12).double(), x) == {Outcome.FAIL}
