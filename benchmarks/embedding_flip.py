"""One flipped sign among 38.6 million gradient elements: is it found, and is the element named?

The model is an embedding of GPT-2's size tied to its output head, so that every element has a gradient. Its backward is
right but for one element, whose sign is flipped; the elements are drawn among those that the stated guarantee covers
(an error larger than the absolute limit of the embedding's row), and, for comparison, among all.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import nn

from audits import AuditSettings, Outcome, Recipe, audit


class FlipOne(torch.autograd.Function):
    """The identity, with one element's gradient negated."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, index: int) -> torch.Tensor:
        ctx.index = index
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        flipped = gradient.clone()
        if ctx.index >= 0:
            flipped.view(-1)[ctx.index] *= -1
        return flipped, None


class Head(nn.Module):
    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.flipped = -1

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        weight = FlipOne.apply(self.embedding.weight, self.flipped)
        hidden = nn.functional.embedding(tokens, weight).cumsum(1).tanh()
        return hidden @ weight.T


def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch["x"])[:, :-1].flatten(0, 1), batch["x"][:, 1:].flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=4, help="planted flips")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Head(50257, 768)
    batch = {"x": torch.randint(0, 50257, (1, 32))}
    recipe = Recipe.capture(model, batch=batch, loss=loss, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    settings = AuditSettings(method="probe", checks=("gradient.finite-difference",))
    value = loss(model, batch)
    (gradient,) = torch.autograd.grad(value, [model.embedding.weight])
    began = time.perf_counter()
    (right,) = audit(model, recipe, settings=settings, device="cpu").rows
    print(
        f"{model.embedding.weight.numel():,} elements; unharmed: {right.outcome}, {time.perf_counter() - began:.1f} s, "
        f"bound {right.threshold:.2g}"
    )
    rms = max(float(model.embedding.weight.detach().norm()) / model.embedding.weight.numel() ** 0.5, 1e-2)
    covered = (2 * gradient.abs().view(-1) > 4 * float(right.threshold or 0) / rms).nonzero().view(-1)
    print(f"covered by the guarantee (|2 g| > 4 B / s): {covered.numel():,}")
    found = named = 0
    for draw in range(options.flips):
        index = int(covered[torch.randint(len(covered), ())])
        model.flipped = index
        began = time.perf_counter()
        (row,) = audit(model, recipe, settings=settings, device="cpu").rows
        found += row.outcome is Outcome.FAIL
        place = divmod(index, 768)
        named += f"{place[0]}, {place[1]}" in row.message or str(index) in row.message
        print(
            f"  {draw + 1}: element {place}, |g| {float(gradient.view(-1)[index].abs()):.2g}: {row.outcome}, "
            f"{time.perf_counter() - began:.1f} s; {row.message[:160]}"
        )
    print(f"found {found} of {options.flips}, element named in {named}")


if __name__ == "__main__":
    main()
