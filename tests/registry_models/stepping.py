"""A model whose submodules have two names each, and training steps for it, right and wrong, for other processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class Twice(nn.Module):
    """Two layers and a dropout, each held by an attribute and by the sequence that runs them."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first, self.drop, self.head = nn.Linear(6, width), nn.Dropout(0.2), nn.Linear(width, 3)
        self.net = nn.Sequential(self.first, nn.Tanh(), self.drop, self.head)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"x": torch.randn(8, 6, generator=generator), "y": torch.arange(8) % 3}


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def _step(model: nn.Module, batch: Any, context: Any) -> None:
    context.optimizer.zero_grad()
    loss(model, batch).backward()
    context.optimizer.step()


def drawing_step(model: nn.Module, batch: Any, context: Any) -> None:
    """Draws before the loss and measures in eval mode afterwards: right."""
    torch.rand(3)
    _step(model, batch, context)
    model.eval()
    with torch.no_grad():
        loss(model, batch)
    model.train()


def rolled_step(model: nn.Module, batch: Any, context: Any) -> None:
    """Draws, and trains on the labels of the rows before."""
    torch.rand(3)
    _step(model, {"x": batch["x"], "y": batch["y"].roll(1)}, context)


def raising_step(model: nn.Module, batch: Any, context: Any) -> None:
    """Has no data left for a second step."""
    if context.optimizer.state:
        raise RuntimeError("out of data")
    _step(model, batch, context)
