"""Slopes too small to see at theta are judged where the tensors concerned are larger; a wrong one fails there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from audits.outcomes import Outcome
from tests.audits.gradients.cases import FINITE, audit, failing, outcomes


class Scaled(torch.autograd.Function):
    """The identity; its backward is off by 5 %."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return 1.05 * gradient


class Flat(nn.Module):
    """Attention whose queries and keys start so small that it is flat, as deep bottlenecks initialise it."""

    def __init__(self, *, bug: bool = False) -> None:
        super().__init__()
        self.bug = bug
        self.squeeze = nn.Linear(8, 8, bias=False)
        self.query, self.key, self.value = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.head = nn.Linear(8, 3)
        for small in (self.squeeze, self.query, self.key):
            nn.init.normal_(small.weight, std=2e-4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.squeeze(x)
        query = self.query(h)
        query = Scaled.apply(query) if self.bug else query
        share = (query @ self.key(h).transpose(1, 2)).softmax(-1)
        return self.head((share @ self.value(x)).mean(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flat_attention_is_judged(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batch = {"x": torch.randn(6, 5, 8, dtype=dtype), "y": torch.randint(0, 3, (6,))}
    rows = audit(Flat().to(dtype), batch, method="probe")
    assert set(outcomes(rows).values()) == {Outcome.PASS}
    far = {r.parameter for r in rows if r.check == FINITE and "displaced" in r.message}
    assert {"query.weight", "key.weight"} <= far
    wrong = audit(Flat(bug=True).to(dtype), batch, method="probe")
    assert "query.weight" in failing(wrong)
    assert "value.weight" not in failing(wrong)
    assert any("Scaled" in str(row.cause) for row in wrong if row.outcome is Outcome.FAIL)
