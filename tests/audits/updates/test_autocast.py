"""Autocast: the reference is evaluated as the step was, with the backward outside (as torch advises) or inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from audits import AuditSettings, Outcome, Recipe, audit


class Tiny(nn.Module):
    """An encoder with tied embeddings: rounding in its backward differs by whether autocast is on."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.encoder = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True, activation="gelu")
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.embedding(tokens)))  # type: ignore[no-any-return]


def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch["tokens"])[:, :-1].flatten(0, 1), batch["tokens"][:, 1:].flatten())


def step(inside: bool, factor: float = 1.0) -> Callable[..., None]:
    def run(model: nn.Module, batch: dict[str, torch.Tensor], context: Any) -> None:
        optimizer = context.optimizers["step"]
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(model, batch) * factor
            if inside:
                value.backward()
        if not inside:
            value.backward()
        optimizer.step()

    return run


def gradients(function: Callable[..., None] | None) -> set[Outcome]:
    model = Tiny()
    recipe = Recipe.capture(
        model,
        batch={"tokens": torch.randint(0, 11, (4, 7))},
        loss=loss,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3),
        precision="bf16-autocast",
        step=function,
    )
    report = audit(model, recipe, settings=AuditSettings(checks=("step.gradient",)), device="cpu")
    assert report.rows
    return {row.outcome for row in report.rows}


@pytest.mark.parametrize("function", [None, step(inside=False), step(inside=True)], ids=["ours", "outside", "inside"])
def test_a_backward_outside_or_inside_autocast_is_right(function: Callable[..., None] | None) -> None:
    assert gradients(function) == {Outcome.PASS}


@pytest.mark.parametrize("inside", [False, True])
def test_a_gradient_off_by_a_factor_is_still_found(inside: bool) -> None:
    assert Outcome.FAIL in gradients(step(inside, factor=1.05))
