"""An embedding's max_norm rescales rows in the forward: torch's own way; what else is written there is found."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from audits.outcomes import Outcome
from tests.audits.updates.subjects import audited, failed, of

ROWS = 12


class Limited(nn.Module):
    """Rows of norm 1 at most, by `how`; `bug` also writes a row that the batch does not use, or one that it does."""

    def __init__(self, how: str, bug: str = "") -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(ROWS, 4), nn.Linear(4, 3)
        nn.init.normal_(self.embed.weight, std=3.0)
        self.how, self.bug = how, bug

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.embed.weight
        with torch.no_grad():
            if self.bug:
                weight[ROWS - 1 if self.bug == "unused" else 0] *= 0.5
        if self.how == "embedding":
            return self.head(F.embedding(x, weight, max_norm=1.0).mean(1))
        if self.how == "bag":
            return self.head(F.embedding_bag(x, weight, max_norm=1.0))
        with torch.no_grad():
            weight.renorm_(2, 0, 1.0)
        return self.head(F.embedding(x, weight).mean(1))


def rows_of(model: nn.Module, *, trained: bool = True):  # type: ignore[no-untyped-def]
    model.embed.weight.requires_grad_(trained)
    batch = {"x": torch.randint(0, ROWS - 2, (6, 5)).clamp(max=ROWS - 3), "y": torch.randint(0, 3, (6,))}
    batch["x"][0, 0] = 0
    held = [p for p in model.parameters() if p.requires_grad]
    return audited(model, batch=batch, loss="cross_entropy", optimizer=torch.optim.SGD(held, lr=0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("how", ["embedding", "bag", "renorm_"])
def test_rescaled_rows_are_no_write_behind_the_optimizer(how: str, trained: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows = rows_of(Limited(how).to(dtype), trained=trained)
    assert failed(rows) == []
    said = of(rows, "update.outside-step", "embed.weight")
    assert {(row.outcome, row.cause) for row in said} == {(Outcome.PASS, "torch's convention")}
    assert "max_norm" in said[0].message


@pytest.mark.parametrize("bug", ["unused", "used"])
@pytest.mark.parametrize("how", ["embedding", "bag", "renorm_"])
def test_what_else_the_forward_writes_is_found(how: str, bug: str) -> None:
    torch.manual_seed(0)
    assert ("update.outside-step", "embed.weight") in failed(rows_of(Limited(how, bug)))
    assert ("update.frozen", "embed.weight") in failed(rows_of(Limited(how, bug), trained=False))


def test_a_projection_in_the_step_is_a_write_still() -> None:
    def step(model, batch, context):  # type: ignore[no-untyped-def]
        context.optimizers["step"].zero_grad()
        F.cross_entropy(model(batch["x"]), batch["y"]).backward()
        context.optimizers["step"].step()
        with torch.no_grad():
            model.embed.weight.renorm_(2, 0, 0.5)

    torch.manual_seed(0)
    model = Limited("embedding")
    batch = {"x": torch.randint(0, ROWS, (6, 5)), "y": torch.randint(0, 3, (6,))}
    rows = audited(
        model, batch=batch, loss="cross_entropy", optimizer=torch.optim.SGD(model.parameters(), lr=0.1), step=step
    )
    assert ("update.outside-step", "embed.weight") in failed(rows)
