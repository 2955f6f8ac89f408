"""Small models of five architectures with their batches and losses; ``trained`` ones have taken a few steps."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Batch = dict[str, torch.Tensor]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.second = nn.Linear(16, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.second(F.gelu(self.first(x)))))


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(4 * 16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.max_pool2d(F.relu(self.norm(self.conv(x))), 2)
        return self.head(self.drop(hidden.flatten(1)))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.attention(self.norm(x)).chunk(3, dim=-1)
        x = x + self.out(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=True)[:, 0])
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Gpt(nn.Module):
    """A language model whose head is tied to its embedding."""

    def __init__(self, vocabulary: int = 19, width: int = 12) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.block = Block(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.embedding(tokens)))


class Gan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 5))
        self.discriminator = nn.Sequential(nn.Linear(5, 12), nn.LeakyReLU(0.2), nn.Linear(12, 1))


class Vae(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(7, 6)
        self.decoder = nn.Linear(3, 7)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mean, log_variance = self.encoder(x).chunk(2, dim=-1)
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)
        return self.decoder(z), mean, log_variance


def classify(model: nn.Module, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def next_token(model: nn.Module, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(model(batch["tokens"]).flatten(0, 1), batch["targets"].flatten(), ignore_index=-100)


def evidence_bound(model: nn.Module, batch: Batch) -> torch.Tensor:
    again, mean, log_variance = model(batch["x"])
    divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(-1).mean()
    return F.mse_loss(again, batch["x"]) + 0.1 * divergence


def noise(batch: Batch) -> torch.Tensor:
    return torch.randn(batch["x"].shape[0], 4, device=batch["x"].device)


def discriminate(model: Any, batch: Batch) -> torch.Tensor:
    fake = model.generator(noise(batch)).detach()
    return F.softplus(-model.discriminator(batch["x"])).mean() + F.softplus(model.discriminator(fake)).mean()


def discriminate_attached(model: Any, batch: Batch) -> torch.Tensor:
    fake = model.generator(noise(batch))
    return F.softplus(-model.discriminator(batch["x"])).mean() + F.softplus(model.discriminator(fake)).mean()


def generate(model: Any, batch: Batch) -> torch.Tensor:
    return F.softplus(-model.discriminator(model.generator(noise(batch)))).mean()


def mlp(seed: int = 0) -> tuple[Mlp, Batch]:
    torch.manual_seed(seed)
    return Mlp(), {"x": torch.randn(12, 6), "y": torch.randint(0, 3, (12,))}


def conv(seed: int = 0) -> tuple[ConvNet, Batch]:
    torch.manual_seed(seed)
    return ConvNet(), {"x": torch.randn(8, 1, 8, 8), "y": torch.randint(0, 3, (8,))}


def gpt(seed: int = 0) -> tuple[Gpt, Batch]:
    torch.manual_seed(seed)
    tokens = torch.randint(0, 19, (4, 9))
    return Gpt(), {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}


def gan(seed: int = 0) -> tuple[Gan, Batch]:
    torch.manual_seed(seed)
    return Gan(), {"x": torch.randn(10, 5)}


def vae(seed: int = 0) -> tuple[Vae, Batch]:
    torch.manual_seed(seed)
    return Vae(), {"x": torch.randn(9, 7)}


def train(model: nn.Module, batch: Batch, loss: Any, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    """Take a few correct steps, so that weights and optimizer state are those of a trained model."""
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
