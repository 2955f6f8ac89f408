"""Losses where none is known: a fixed random projection of the output; and targets that fit an output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from audits.errors import RecipeError
from audits.structures import tensors_in

_SEED = 20_240_602


def call_model(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """Call the model with an inferred batch: ``inputs``, or ``arguments`` and ``keywords``."""
    if "inputs" in batch:
        return model(batch["inputs"])
    return model(*batch.get("arguments", ()), **batch.get("keywords", {}))


def random_projection(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """Return ``sum_k <r_k, y_k> / sqrt(numel(y_k))`` over the model's floating-point outputs ``y_k``.

    ``r_k`` is drawn once from N(0, 1) by a seed of its own, so the loss is the same function at every call; its
    gradient with respect to the outputs is of norm about 1 and touches every one of them.

    Raises:
        RecipeError: the model returns no floating-point tensor.
    """
    total: torch.Tensor | None = None
    for index, (_, output) in enumerate(tensors_in(call_model(model, batch))):
        if not output.is_floating_point() or not output.numel():
            continue
        direction = np.random.RandomState(_SEED + index).standard_normal(tuple(output.shape)) / output.numel() ** 0.5
        weights = torch.from_numpy(np.asarray(direction)).to(dtype=output.dtype, device=output.device)
        part = (weights * output).sum()
        total = part if total is None else total + part
    if total is None:
        raise RecipeError("the model returns no floating-point tensor, so no loss can be assumed: attach a recipe")
    return total


def fitting_targets(output: Any) -> Iterator[torch.Tensor]:
    """Yield targets that a loss might want for this output: class numbers first, then numbers in [0, 1]."""
    first = next((t for _, t in tensors_in(output) if t.is_floating_point() and t.dim()), None)
    if first is None:
        return
    generator = torch.Generator().manual_seed(_SEED)
    if first.dim() >= 2 and first.shape[1] > 1:
        yield torch.randint(0, first.shape[1], (first.shape[0], *first.shape[2:]), generator=generator)
    halves = torch.randint(0, 2, tuple(first.shape), generator=generator).to(torch.float32)
    yield halves
    if first.dim() >= 2 and first.shape[-1] == 1:
        yield halves.squeeze(-1)
    if first.dim() > 2:
        yield torch.randint(0, first.shape[-1], tuple(first.shape[:-1]), generator=generator)
