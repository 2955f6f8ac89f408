"""Networks whose first call in a process does something that no later call does; importable, so that they travel."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from audits import Recipe
from registry_models.artifacts.factory_files import Factory, write_factory
from registry_models.recipes.recipe_files import FOLDER, write_recipe

#: What was "tuned" in this process; a fresh process has tuned nothing. Tests clear it to stand for one.
TUNED: set[Any] = set()


def tuning_runs(fault: str, *key: Any) -> int:
    """How often an in-place kernel runs: an autotuner's trials at its first call, once later."""
    if (fault, *key) in TUNED:
        return 1
    TUNED.add((fault, *key))
    return 3


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor, fault: str) -> torch.Tensor:
        ctx.save_for_backward(x, scale)
        ctx.fault = fault
        out = torch.zeros_like(x)
        for _ in range(tuning_runs(fault, x.dtype) if fault == "forward" else 1):
            out += x * scale
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        x, scale = ctx.saved_tensors
        total = torch.zeros_like(scale)
        for _ in range(tuning_runs(ctx.fault, x.dtype) if ctx.fault == "backward" else 1):
            total += (gradient * x).sum(0)
        if ctx.fault == "noise":  # unseeded, and never twice the same
            total *= 1.0 + int.from_bytes(os.urandom(4), "big") / 2**32
        return gradient * scale, total, None


class Net(nn.Module):
    def __init__(self, fault: str = "none") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fault = fault
        self.first, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fault == "initialisation" and tuning_runs(self.fault) > 1:
            with torch.no_grad():
                self.first.weight.mul_(0.5)
        return self.head(torch.tanh(_Scale.apply(self.first(x), self.scale, self.fault)))  # type: ignore[no-any-return]


class TunedSGD(torch.optim.SGD):
    """SGD as an in-place kernel that is tuned per shape."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                for _ in range(tuning_runs("optimizer", p.dtype, p.shape) if p.grad is not None else 0):
                    p.data.add_(p.grad, alpha=-group["lr"])


def loss(model: Any, batch: Any) -> torch.Tensor:
    return nn.functional.mse_loss(model(batch["x"]), batch["y"])


def case(fault: str, dtype: torch.dtype = torch.float32, **more: Any) -> tuple[Net, Recipe]:
    model = Net(fault).to(dtype)
    generator = torch.Generator().manual_seed(1)
    batch = {name: torch.randn(8, width, generator=generator).to(dtype) for name, width in (("x", 3), ("y", 2))}
    optimizer = (TunedSGD if fault == "optimizer" else torch.optim.SGD)(model.parameters(), lr=0.01)
    arguments = {"batch": batch, "loss": loss, "expect": {"optimizer": "SGD"}, **more}
    return model, Recipe.capture(model, optimizer=optimizer, **arguments)


def write(folder: Path, fault: str) -> Path:
    """Write a model directory, as the registry keeps it."""
    factory = Factory("tests.audits.repeating.first_call_models:Net", {"fault": fault})
    model, recipe = case(fault)
    write_recipe(recipe, folder / "extra_files")
    write_factory(model, factory, folder / "extra_files" / FOLDER)
    (folder / "MLmodel").write_text(yaml.safe_dump({"flavors": {"pytorch": {"model_data": "data"}}}))
    return folder
