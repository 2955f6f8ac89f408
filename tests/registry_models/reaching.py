"""Models and steps for versions: what reaches the loss, what micro-batches weigh, what a step does to its batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

VOCABULARY, WIDTH = 11, 8

Batch = dict[str, torch.Tensor]


class Speaker(nn.Module):
    """A language model whose middle layer may be kept in a plain list, and that may have a pooler nobody calls."""

    def __init__(self, registered: bool = True, pooler: bool = False) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        layer = nn.Linear(WIDTH, WIDTH)
        self.hidden: Any = nn.ModuleList([layer]) if registered else [layer]
        if pooler:
            self.pooler = nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.hidden[0](self.embedding(tokens))))


def batches() -> list[Batch]:
    """Two micro-batches of which 3 and 17 labels count."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for count in (3, 17):
        labels = torch.full((18,), -100)
        labels[:count] = torch.randint(1, VOCABULARY, (count,), generator=generator)
        tokens = torch.randint(1, VOCABULARY, (3, 6), generator=generator)
        found.append({"tokens": tokens, "labels": labels.view(3, 6)})
    return found


def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(model(batch["tokens"]).flatten(0, 1), batch["labels"].flatten())


def _counted(batch: Batch) -> int:
    return int((batch["labels"] != -100).sum())


def mean_of_means(model: nn.Module, parts: list[Batch], context: Any) -> None:
    context.optimizer.zero_grad()
    for part in parts:
        (loss(model, part) / len(parts)).backward()
    context.optimizer.step()


def by_tokens(model: nn.Module, parts: list[Batch], context: Any) -> None:
    context.optimizer.zero_grad()
    for part in parts:
        (loss(model, part) * (_counted(part) / sum(map(_counted, parts)))).backward()
    context.optimizer.step()


def masking(model: nn.Module, parts: list[Batch], context: Any) -> None:
    """Weighs by tokens, and afterwards takes labels away from the batch that the next step gets."""
    by_tokens(model, parts, context)
    for part in parts:
        part["labels"][0, 1:3] = -100
