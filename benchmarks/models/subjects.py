"""What a subject of `benchmarks/calm.py` is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

#: What makes a recipe: model, batch, loss, optimizer.
Made = tuple[nn.Module, Any, Any, torch.optim.Optimizer]
Subjects = Iterator[tuple[str, Callable[[], Made]]]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
