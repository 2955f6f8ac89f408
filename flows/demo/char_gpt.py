"""A small GPT over characters, trained on scikit-learn's dataset descriptions.

Version 1 ties its output head to the token embedding. Version 2 gives the head weights of its own, and puts a fresh
head in place after the optimizer was built: the optimizer keeps the old one, and the new one is never trained.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from audits import Recipe
from flows.demo.data import VOCABULARY, load_text
from flows.demo.training import TrainedModel, seeded

WIDTH = 64
HEADS = 4
LAYERS = 2
CONTEXT = 32
DROPOUT = 0.1
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.1
CLIP_GRAD_NORM = 1.0
BATCH_SIZE = 16
STEPS = 250
#: The schedule ends later than the demo trains: the version is registered in the middle of training.
SCHEDULED_STEPS = 400


class Attention(nn.Module):
    """Causal self-attention with several heads, (N, T, WIDTH) to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.projections = nn.Linear(WIDTH, 3 * WIDTH)
        self.output = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend to this position and earlier ones."""
        count, length, _ = x.shape
        projected = self.projections(x).view(count, length, 3, HEADS, WIDTH // HEADS)
        query, key, value = projected.permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.output(attended.transpose(1, 2).reshape(x.shape))  # type: ignore[no-any-return]


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.mlp_norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add what attention and the MLP have to say."""
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))  # type: ignore[no-any-return]


class CharGpt(nn.Module):
    """Token indices (N, T), T at most CONTEXT, to logits (N, T, vocabulary)."""

    def __init__(self, vocabulary: int, *, tied: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, vocabulary, bias=False)
        self.apply(_initialise)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits of each next character."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.05)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def build(vocabulary: int = len(VOCABULARY), tied: bool = True) -> CharGpt:
    """Build the model."""
    return CharGpt(vocabulary, tied=tied)


def next_character_loss(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross entropy of every next character, in nats."""
    logits = model(batch["tokens"])
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())


def build_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """Return AdamW that decays matrices and spares biases and norms."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95))


def sample_batch(text: torch.Tensor) -> dict[str, torch.Tensor]:
    """Draw windows of the text and the characters that follow them."""
    starts = torch.randint(len(text) - CONTEXT - 1, (BATCH_SIZE, 1))
    windows = text[starts + torch.arange(CONTEXT + 1)]
    return {"tokens": windows[:, :-1], "targets": windows[:, 1:]}


def train(*, fresh_head: bool = False, seed: int = 0) -> TrainedModel:
    """Train the model; ``fresh_head`` is version 2."""
    text = load_text()
    with seeded(seed):
        model = build(tied=not fresh_head)
        optimizer = build_optimizer(model)
        if fresh_head:
            # THE PLANTED BUG: two lines up, the optimizer has already collected the parameters.
            model.head = nn.Linear(WIDTH, len(VOCABULARY), bias=False)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, SCHEDULED_STEPS, eta_min=LEARNING_RATE / 10)
        losses = []
        for _ in range(STEPS):
            batch = sample_batch(text)
            optimizer.zero_grad()
            loss = next_character_loss(model, batch)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP_GRAD_NORM)
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
        recipe = Recipe.capture(
            model,
            batch=batch,
            loss=next_character_loss,
            optimizer=optimizer,
            clip_grad_norm=CLIP_GRAD_NORM,
            scheduler=scheduler,
            expect={"optimizer": "AdamW", "weight_decay": {"*norm*": 0.0, "*.bias": 0.0, "*": WEIGHT_DECAY}},
        )
    return TrainedModel(
        model,
        recipe,
        losses=tuple(losses),
        factory="flows.demo.char_gpt:build",
        factory_args={"vocabulary": len(VOCABULARY), "tied": not fresh_head},
        hyperparameters={
            "optimizer_name": "AdamW", "lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "steps": STEPS,
            "batch_size": BATCH_SIZE, "clip_grad_norm": CLIP_GRAD_NORM, "tied": str(not fresh_head),
        },
    )  # fmt: skip
