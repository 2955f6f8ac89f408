"""The tutorial's example: ``Linear(2, 1)`` on two rows, mean squared error, SGD."""

from __future__ import annotations

import torch
from torch import nn

from audits import Recipe
from flows.demo.training import TrainedModel, seeded

LEARNING_RATE = 0.01
STEPS = 12


def build() -> nn.Linear:
    """Build the model."""
    return nn.Linear(2, 1)


def train(*, seed: int = 0) -> TrainedModel:
    """Train it for a dozen steps of full-batch gradient descent."""
    with seeded(seed):
        model = build()
    batch = {"inputs": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "targets": torch.tensor([[3.0], [7.0]])}
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(batch["inputs"]), batch["targets"])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return TrainedModel(
        model,
        Recipe.capture(model, batch=batch, loss="mse_loss", optimizer=optimizer, expect={"optimizer": "SGD"}),
        losses=tuple(losses),
        factory="flows.demo.tutorial_linear:build",
        hyperparameters={"optimizer_name": "SGD", "lr": LEARNING_RATE, "steps": STEPS, "batch_size": 2},
    )
