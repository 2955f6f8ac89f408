"""Operators without a float64 kernel: what stands in for them is torch's own kernel, and their gradients are judged."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from audits import AuditSettings, Recipe
from audits import audit as audit_model
from audits.lanes.emulation import grouped_mm
from audits.outcomes import Outcome

ENDS = torch.tensor([8, 16, 16, 32], dtype=torch.int32)
SHAPES = {
    "rows of a": ((32, 16), (4, 16, 8), ENDS),
    "columns of b": ((4, 8, 16), (16, 32), ENDS),
    "inner": ((16, 32), (32, 8), ENDS),
    "nothing": ((4, 8, 16), (4, 16, 24), None),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_grouped_mm_is_torchs_own(shape: str) -> None:
    a_shape, b_shape, ends = SHAPES[shape]
    torch.manual_seed(3)
    a, b = torch.randn(a_shape), torch.randn(b_shape)
    native = F.grouped_mm(a, b, offs=ends)
    emulated = grouped_mm(a.double(), b.double(), ends)
    assert emulated.dtype is torch.float64
    assert emulated.shape == native.shape
    torch.testing.assert_close(emulated.float(), native, rtol=1e-5, atol=1e-5)


class Experts(nn.Module):
    """Two grouped products, the second's weights behind a hook that may spoil their gradient."""

    def __init__(self, spoil: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(4, 16, 16) / 4), nn.Parameter(torch.randn(4, 16, 8) / 4)
        self.spoil = spoil

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        down = self.down.clone()
        if self.spoil is not None:
            down.register_hook(self.spoil)
        return F.grouped_mm(torch.relu(F.grouped_mm(x, self.up, offs=ENDS)), down, offs=ENDS)


@pytest.mark.parametrize("method", ["exact", "probe"])
@pytest.mark.parametrize("wrong", [False, True], ids=["right", "one expert's gradient doubled"])
def test_experts_through_grouped_products_are_judged_in_float64(method: str, wrong: bool) -> None:
    def doubled(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient[1] *= 2
        return gradient

    torch.manual_seed(5)
    model = Experts(doubled if wrong else None)
    batch = {"inputs": torch.randn(32, 16), "targets": torch.randint(0, 8, (32,))}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = Recipe.capture(model, batch=batch, loss="cross_entropy", optimizer=optimizer)
    rows = audit_model(model, recipe, settings=AuditSettings(checks=("gradient.*",), method=method)).rows
    judged = {row.parameter: row for row in rows if row.check == "gradient.finite-difference"}
    assert {row.lane for row in judged.values()} == {"float64"}
    assert judged["up"].outcome is Outcome.PASS
    assert judged["down"].outcome is (Outcome.FAIL if wrong else Outcome.PASS)
    native = [row for row in rows if row.check == "gradient.native-dtype" and "_grouped_mm" in row.message]
    assert [row.outcome for row in native] == [Outcome.PASS], "torch's own kernel against float64"
