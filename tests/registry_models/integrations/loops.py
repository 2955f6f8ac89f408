"""Loops written with accelerate, right and wrong on purpose, that can be imported where versions are loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from registry_models.integrations.accelerate import accelerated


class Net(nn.Module):
    """Two layers and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.0), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)  # type: ignore[no-any-return]


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """Cross-entropy."""
    return nn.functional.cross_entropy(model(batch["x"]).float(), batch["y"])


def _loop(model: nn.Module, batches: Any, context: Any, fault: str = "", precision: str = "no") -> None:
    steps = 1 if fault == "sums" else 2
    with accelerated(model, context, gradient_accumulation_steps=steps, mixed_precision=precision) as prepared:
        accelerator, model, optimizer, scheduler = prepared
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with accelerator.accumulate(model):
                if fault == "eval":
                    model.eval()
                value = loss(model, batch)
                accelerator.backward(value / 2 if fault == "divides" else value)
                if fault == "sums":
                    if last:
                        accelerator.clip_grad_norm_(model.parameters(), 1e3)
                        optimizer.step()
                        scheduler.step()
                        optimizer.zero_grad()
                    continue
                if fault == "value":
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_value_(model.parameters(), 1e-3)
                elif fault != "unclipped" and (accelerator.sync_gradients or fault == "clips often"):
                    accelerator.clip_grad_norm_(model.parameters(), 1e-2 if fault == "norm" else 1e3)
                optimizer.step()
                if fault == "steps often" and last:
                    optimizer.step()
                scheduler.step()
                if fault == "schedule":
                    scheduler.step()
                if fault != "zero_grad":
                    optimizer.zero_grad()
        if fault == "writes":
            with torch.no_grad():
                next(model.parameters()).mul_(0.99)


def right(model: nn.Module, batches: Any, context: Any) -> None:
    """The loop of accelerate's guide."""
    _loop(model, batches, context)


def right_bf16(model: nn.Module, batches: Any, context: Any) -> None:
    """The same under autocast."""
    _loop(model, batches, context, precision="bf16")


def sums(model: nn.Module, batches: Any, context: Any) -> None:
    """Accumulates by hand and does not divide."""
    _loop(model, batches, context, "sums")


def divides(model: nn.Module, batches: Any, context: Any) -> None:
    """Divides what accelerate has divided."""
    _loop(model, batches, context, "divides")


def forgets_zero_grad(model: nn.Module, batches: Any, context: Any) -> None:
    """Never clears the gradients."""
    _loop(model, batches, context, "zero_grad")


def clips_often(model: nn.Module, batches: Any, context: Any) -> None:
    """Clips after every micro-batch."""
    _loop(model, batches, context, "clips often")


def clips_by_value(model: nn.Module, batches: Any, context: Any) -> None:
    """Clips by value, declared is by norm."""
    _loop(model, batches, context, "value")


def clips_to_another_norm(model: nn.Module, batches: Any, context: Any) -> None:
    """Clips to another norm than declared."""
    _loop(model, batches, context, "norm")


def steps_often(model: nn.Module, batches: Any, context: Any) -> None:
    """Steps twice."""
    _loop(model, batches, context, "steps often")


def schedules_often(model: nn.Module, batches: Any, context: Any) -> None:
    """Steps the schedule twice."""
    _loop(model, batches, context, "schedule")


def leaves_eval(model: nn.Module, batches: Any, context: Any) -> None:
    """Trains in eval mode."""
    _loop(model, batches, context, "eval")


def writes_weights(model: nn.Module, batches: Any, context: Any) -> None:
    """Writes a weight after the step."""
    _loop(model, batches, context, "writes")
