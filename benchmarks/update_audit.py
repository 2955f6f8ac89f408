"""Cost of the update audit against the two training steps it audits, at 10k, 1M and 124M parameters.

Prints, per size: CPU seconds (median of some) of two plain training steps, of one optimizer step in float64
(torch's for-loop), of the
audit's recorded and judged steps, of the synthetic probe, and the ratio

    (audit - one float64 optimizer step) / two training steps

which the design bounds by 3 at 1M parameters.

    python benchmarks/update_audit.py [--sizes 10k 1M 124M] [--threads 1]
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from audits.live.subject import Subject, open_subject
from audits.recipe.recipe import Recipe
from audits.updates import check_registration
from audits.updates.audit import run_once, synthetic_rows

#: name -> (layers, width, vocabulary, batch, length)
SIZES = {"10k": (1, 24, 96, 4, 64), "1M": (4, 128, 2048, 8, 128), "124M": (12, 768, 50257, 1, 256)}


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        parts = self.attention(self.first(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.second(x))))


class Gpt(nn.Module):
    """GPT-2's shape, head tied to the embedding."""

    def __init__(self, layers: int, width: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(vocabulary, width), nn.Embedding(max(length, 1024), width)
        self.blocks = nn.Sequential(*(Block(width, max(1, width // 64)) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        for parameter in self.parameters():  # logits of unit-variance embeddings underflow, and denormals are slow
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]
        return self.norm(self.blocks(x)) @ self.embedding.weight.T


def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch["tokens"]).flatten(0, 1), batch["targets"].flatten())


def seconds(work: Callable[[], Any]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def measure(name: str, repeats: int) -> None:
    layers, width, vocabulary, batch_size, length = SIZES[name]
    torch.manual_seed(0)
    model = Gpt(layers, width, vocabulary, length)
    tokens = torch.randint(0, vocabulary, (batch_size, length + 1))
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def two_steps() -> None:
        for _ in range(2):
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()

    two_steps()
    count = sum(p.numel() for p in model.parameters())
    float64_times = float64_step(model, repeats)
    recipe = Recipe.capture(model, batch=batch, loss=loss, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3))
    with open_subject(model, recipe, device="cpu") as subject:
        parts: list[Callable[[], Any]] = [
            two_steps,
            lambda: check_registration(subject),
            lambda: steps_only(subject),
            lambda: [synthetic_rows(subject, phase) for phase in subject.phases],
        ]
        # side by side, so that what else the machine does strikes all alike
        measured = [tuple(seconds(part) for part in parts) for _ in range(repeats)]
    training, registration, steps, probe = (statistics.median(part) for part in zip(*measured, strict=True))
    one_float64 = statistics.median(float64_times)
    audit = registration + steps + probe
    ratio = statistics.median((sum(m[1:]) - one_float64) / m[0] for m in measured)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{name:>5} {count:>12,} {training:>10.3f} {one_float64:>12.3f} {registration:>9.3f} {steps:>9.3f}"
        f" {probe:>8.3f} {audit / training:>8.1f} {ratio:>8.1f} {peak:>7.1f}"
    )


def float64_step(model: nn.Module, repeats: int) -> list[float]:
    wide = [nn.Parameter(p.detach().double()) for p in model.parameters()]
    for copy, parameter in zip(wide, model.parameters(), strict=True):
        copy.grad = parameter.grad.double()
    optimizer = torch.optim.AdamW(wide, lr=1e-3, foreach=False)
    return [seconds(optimizer.step) for _ in range(repeats + 1)][1:]


def steps_only(subject: Subject) -> None:
    run_once(subject, subject.seed)
    subject.reset()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["10k", "1M"], choices=list(SIZES))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, {arguments.threads} thread(s), AdamW, float32; CPU seconds")
    print(f"{'size':>5} {'parameters':>12} {'2 steps':>10} {'1 f64 step':>12} {'register':>9} {'judged':>9}"
          f" {'probe':>8} {'audit/2':>8} {'ratio':>8} {'GiB':>7}")  # fmt: skip
    for name in arguments.sizes:
        measure(name, 1 if name == "124M" else 9)


if __name__ == "__main__":
    main()
