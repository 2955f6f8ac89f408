"""Transfer learning: a backbone pretrained on the digits 0 to 4, frozen, and a head trained on 5 to 9.

Version 2 "freezes" the backbone by zeroing its gradients before each step. AdamW decays every weight it holds, whatever
the gradient, so the pretrained features shrink a little in every step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from audits import Recipe
from flows.demo.data import Digits, load_digits
from flows.demo.training import TrainedModel, seeded

LEARNING_RATE = 1e-2
WEIGHT_DECAY = 0.05
BATCH_SIZE = 64
PRETRAINING_STEPS = 120
STEPS = 150
CLASSES = 5
FEATURES = 128


class StepContext(Protocol):
    """What a training step is given beside model and batch: the optimizers, by the phase's name."""

    @property
    def optimizers(self) -> Mapping[str, torch.optim.Optimizer]:
        """The optimizers; a single phase is named ``step``."""


@dataclass(frozen=True)
class _Training:
    optimizers: Mapping[str, torch.optim.Optimizer]


class FrozenFeatures(nn.Module):
    """A backbone of two layers and a linear head: (N, 8, 8) images to (N, 5) logits."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, FEATURES), nn.GELU()
        )  # fmt: skip
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        return self.head(self.backbone(images))  # type: ignore[no-any-return]


def build() -> FrozenFeatures:
    """Build the model."""
    return FrozenFeatures()


def loss(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross entropy."""
    return nn.functional.cross_entropy(model(batch["images"]), batch["labels"])


def train_step(model: FrozenFeatures, batch: Mapping[str, torch.Tensor], context: StepContext) -> None:
    """One training step of the head; the backbone takes no gradient."""
    optimizer = context.optimizers["step"]
    optimizer.zero_grad()
    loss(model, batch).backward()
    optimizer.step()


def train_step_zeroed(model: FrozenFeatures, batch: Mapping[str, torch.Tensor], context: StepContext) -> None:
    """One training step that means to leave the backbone alone, and does not."""
    optimizer = context.optimizers["step"]
    optimizer.zero_grad()
    loss(model, batch).backward()
    # THE PLANTED BUG: a zero gradient stops Adam's own update, not the weight decay beside it.
    for parameter in model.backbone.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()
    optimizer.step()


def train(*, zero_gradients: bool = False, seed: int = 0) -> TrainedModel:
    """Pretrain the backbone, then train a new head on it; ``zero_gradients`` is version 2."""
    training, held_out = load_digits()
    with seeded(seed):
        model = build()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        _run(model, training.only(0, 4), optimizer, train_step, PRETRAINING_STEPS)
        pretrained = [parameter.detach().clone() for parameter in model.backbone.parameters()]

        model.head = nn.Linear(FEATURES, CLASSES)
        step: Callable[..., None]
        if zero_gradients:
            step = train_step_zeroed
            optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        else:
            step = train_step
            model.backbone.requires_grad_(False)
            optimizer = torch.optim.AdamW(model.head.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        losses, batch = _run(model, training.only(5, 9), optimizer, step, STEPS)
    recipe = Recipe.capture(model, batch=batch, loss=loss, optimizer=optimizer, step=step,
                            expect={"optimizer": "AdamW", "frozen": ["backbone.*"]})  # fmt: skip
    test = held_out.only(5, 9)
    with torch.no_grad():
        accuracy = (model(test.images).argmax(1) == test.labels).float().mean().item()
        moved = max((p - q).abs().max().item() for p, q in zip(model.backbone.parameters(), pretrained, strict=True))
    return TrainedModel(
        model,
        recipe,
        losses=losses,
        factory="flows.demo.frozen_features:build",
        metrics={"held_out_accuracy": accuracy, "backbone_moved_by": moved},
        hyperparameters={
            "optimizer_name": "AdamW", "lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "steps": STEPS,
            "batch_size": BATCH_SIZE, "pretraining_steps": PRETRAINING_STEPS,
        },
    )  # fmt: skip


def _run(
    model: FrozenFeatures, data: Digits, optimizer: torch.optim.Optimizer, step: Callable[..., None], steps: int
) -> tuple[tuple[float, ...], dict[str, torch.Tensor]]:
    """Train for so many steps; return the loss before each step and the last batch."""
    context = _Training({"step": optimizer})
    losses = []
    for _ in range(steps):
        chosen = torch.randint(len(data.labels), (BATCH_SIZE,))
        batch = {"images": data.images[chosen], "labels": data.labels[chosen]}
        with torch.no_grad():
            losses.append(loss(model, batch).item())
        step(model, batch, context)
    return tuple(losses), batch
