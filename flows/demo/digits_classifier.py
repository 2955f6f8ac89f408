"""A convolutional classifier of handwritten digits, with BatchNorm, trained by AdamW.

Version 2 swaps its activation for `ScaledGelu`, whose backward somebody wrote by hand and got wrong. It trains about as
well as version 1, which is why nobody noticed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from audits import Recipe
from flows.demo.data import load_digits
from flows.demo.training import TrainedModel, seeded

LEARNING_RATE = 3e-3
BATCH_SIZE = 64
STEPS = 120
CLASSES = 10


class ScaledGeluFunction(torch.autograd.Function):
    """``y = s x Phi(x)`` with a learned scale s (0-dim), Phi the normal distribution function and phi its density.

    The derivatives are ``dy/dx = s (Phi(x) + x phi(x))`` and ``dy/ds = x Phi(x)``.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Return ``s x Phi(x)``, element by element."""
        ctx.save_for_backward(x, scale)
        return scale * x * _normal_distribution(x)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """Return the gradients of ``x`` and of the scale."""
        x, scale = ctx.saved_tensors
        # THE PLANTED BUG: "like ReLU, it is flat below zero". It is not: the slope at -0.1 is still 0.42 s.
        grad_output = torch.where(x > 0, grad_output, torch.zeros_like(grad_output))
        distribution = _normal_distribution(x)
        density = torch.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)
        return grad_output * scale * (distribution + x * density), (grad_output * x * distribution).sum()


def _normal_distribution(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


class ScaledGelu(nn.Module):
    """GELU with a learned scale, which starts where standard normal input gives about unit variance."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the activation, element by element."""
        result: torch.Tensor = ScaledGeluFunction.apply(x, self.scale)
        return result


class ConvolutionBlock(nn.Sequential):
    """Convolution, BatchNorm, activation."""

    def __init__(self, inputs: int, outputs: int, stride: int, activation: nn.Module) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.activation = activation


class DigitsClassifier(nn.Module):
    """Two convolution blocks and a linear head: (N, 8, 8) images to (N, 10) logits."""

    def __init__(self, activation: type[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            ConvolutionBlock(1, 16, 1, activation()),
            ConvolutionBlock(16, 32, 2, activation()),
        )
        self.head = nn.Linear(32 * 4 * 4, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        return self.head(self.blocks(images.unsqueeze(1)).flatten(1))  # type: ignore[no-any-return]


ACTIVATIONS: Mapping[str, type[nn.Module]] = {"gelu": nn.GELU, "scaled-gelu": ScaledGelu}


def build(activation: str = "gelu") -> DigitsClassifier:
    """Build the model with the activation of that name."""
    return DigitsClassifier(ACTIVATIONS[activation])


def train(*, activation: str = "gelu", seed: int = 0) -> TrainedModel:
    """Train the classifier."""
    training, held_out = load_digits()
    with seeded(seed):
        model = build(activation)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
        losses = []
        for _ in range(STEPS):
            chosen = torch.randint(len(training.labels), (BATCH_SIZE,))
            batch = {"images": training.images[chosen], "labels": training.labels[chosen]}
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(batch["images"]), batch["labels"])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    recipe = Recipe.capture(model, batch=batch, loss="cross_entropy", optimizer=optimizer,
                            expect={"optimizer": "AdamW", "weight_decay": 0.01})  # fmt: skip
    model.eval()
    with torch.no_grad():
        accuracy = (model(held_out.images).argmax(1) == held_out.labels).float().mean().item()
    model.train()
    return TrainedModel(
        model,
        recipe,
        losses=tuple(losses),
        factory="flows.demo.digits_classifier:build",
        factory_args={"activation": activation},
        metrics={"held_out_accuracy": accuracy},
        hyperparameters={
            "optimizer_name": "AdamW", "lr": LEARNING_RATE, "weight_decay": 0.01, "steps": STEPS,
            "batch_size": BATCH_SIZE, "activation": activation,
        },
    )  # fmt: skip
