"""CTC: torch's gradient is the one by normalised log probabilities; logits handed over as they are fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from audits.outcomes import Outcome
from tests.audits.gradients.cases import Activation, ScaledSwish, Swish, audit, failing


class Speech(nn.Module):
    """Log probabilities over 5 symbols for 9 frames; `logits` forgets the log_softmax, `bug` is wrong before it."""

    def __init__(self, *, logits: bool = False, bug: bool = False, scaled: bool = False) -> None:
        super().__init__()
        self.front = nn.Sequential(nn.Linear(4, 8), Activation(ScaledSwish if bug else Swish), nn.Linear(8, 5))
        self.scale = nn.Parameter(torch.ones(5)) if scaled else None
        self.logits = logits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.front(x)
        out = out if self.logits else out.log_softmax(-1)
        return out if self.scale is None else out * self.scale


def ctc(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.ctc_loss(model(batch["x"]), batch["y"], batch["frames"], batch["symbols"])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ctc_gives_the_gradient_by_normalised_log_probabilities(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batch = {
        "x": torch.randn(9, 2, 4, dtype=dtype), "y": torch.randint(1, 5, (2, 3)), "frames": torch.tensor([9, 8]),
        "symbols": torch.tensor([3, 2]),
    }  # fmt: skip
    for right in (Speech(), Speech(scaled=True)):
        assert not failing(audit(right.to(dtype), batch, ctc))
    bug = audit(Speech(bug=True).to(dtype), batch, ctc)
    assert failing(bug) == {"front.0.weight", "front.0.bias"}
    assert all("ScaledSwish" in str(row.cause) for row in bug if row.outcome is Outcome.FAIL)
    assert "front.2.weight" in failing(audit(Speech(logits=True).to(dtype), batch, ctc)), "no log_softmax before it"
