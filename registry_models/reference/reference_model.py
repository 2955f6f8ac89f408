"""The reference model: layers whose derivatives are right, and one whose derivative is wrong on purpose."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

#: The wrong layer's derivative, as a multiple of the right one.
WRONG_BY = 1.01


class _WrongOnPurpose(torch.autograd.Function):
    """``y = x * scale``, with 1.01 times the derivative by ``scale``."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, scale)
        return x * scale

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (gradient,) = gradients
        x, scale = ctx.saved_tensors
        return gradient * scale, WRONG_BY * (gradient * x).sum(dim=tuple(range(x.dim() - 1)))


class WrongScale(nn.Module):
    """A scale per feature with a wrong derivative."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale the last dimension of ``x``."""
        scaled: torch.Tensor = _WrongOnPurpose.apply(x, self.scale)
        return scaled


class ReferenceModel(nn.Module):
    """Embedding, convolution, attention, normalisation and a head, each once, and a wrong twin of the scale."""

    def __init__(self, features: int = 8, tokens: int = 11) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, features)
        self.convolution = nn.Conv1d(features, features, 3, padding=1)
        self.attention = nn.MultiheadAttention(features, 2, batch_first=True)
        self.normalisation = nn.LayerNorm(features)
        self.wrong = WrongScale(features)
        self.head = nn.Linear(features, tokens)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits of shape (batch, tokens, length) for token numbers of shape (batch, length)."""
        x = self.embedding(tokens)
        x = x + torch.tanh(self.convolution(x.transpose(1, 2)).transpose(1, 2))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.wrong(self.normalisation(x))
        logits: torch.Tensor = self.head(nn.functional.gelu(x))
        return logits.transpose(1, 2)
