"""Correct models of ordinary kinds, as they are found in repositories: each a function making model, batch and loss.

Written without a look at what the checks do about them; `benchmarks/calm.py` runs them, in float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Made = tuple[nn.Module, Any, Any]
ORDINARY: dict[str, Callable[[], Made]] = {}


def ordinary(make: Callable[[], Made]) -> Callable[[], Made]:
    ORDINARY[make.__name__] = make
    return make


def mlp(*widths: int, act: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers[:-1])


def labelled(n: int = 16, width: int = 8, kinds: int = 3) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(n, width), "y": torch.randint(0, kinds, (n,))}


def images(n: int = 4, channels: int = 3, size: int = 8, kinds: int = 3) -> dict[str, torch.Tensor]:
    return {"x": torch.rand(n, channels, size, size), "y": torch.randint(0, kinds, (n,))}


class Named(nn.Module):
    """Modules by name; the loss says how they are used."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
