"""Sparse gradients whose rows occur more than once: each is added up once, in its own dtype."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.audits.updates.subjects import audited, failed, of


class HalfOfRepeated(torch.optim.SGD):
    """SGD that forgets to add up rows which occur more than once."""

    def step(self, closure=None):  # type: ignore[no-untyped-def]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.grad.is_sparse:
                    rows, index = p.grad._values(), p.grad._indices()[0]
                    kept = torch.zeros_like(p)
                    kept[index] = rows
                    p.grad = kept
        return super().step(closure)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_repeated_rows_are_no_false_alarm_and_forgotten_ones_are_found(dtype: torch.dtype, momentum: float) -> None:
    torch.manual_seed(0)
    batch = {"x": torch.randint(0, 23, (6, 5)), "y": torch.randint(0, 3, (6,))}
    for kind, alarms in ((torch.optim.SGD, False), (HalfOfRepeated, True)):
        model = nn.Sequential(nn.Embedding(23, 6, sparse=True), nn.Flatten(), nn.Linear(30, 3)).to(dtype)
        optimizer = kind(model.parameters(), lr=0.01, momentum=momentum)
        rows = audited(model, batch=batch, loss="cross_entropy", optimizer=optimizer, expect={"optimizer": "SGD"})
        assert bool(failed(rows)) is alarms
        assert of(rows, "update.rule", "0.weight")
