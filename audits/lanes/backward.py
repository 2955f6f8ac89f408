"""Gradients of a loss without a trace, also of graphs that only work in a plain ``backward()``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

Result = TypeVar("Result")


def by_grad_or_backward(run: Callable[[bool], Result]) -> Result:
    """Return ``run(False)``, or ``run(True)`` where the graph refuses `torch.autograd.grad`.

    A reentrant checkpoint works in ``backward()`` alone. `torch.autograd.grad` is the first choice, since it touches no
    ``.grad`` of a batch tensor and starts no hook of an optimizer that steps inside the backward.

    Args:
        run: evaluates the loss from its start and calls `gradients_of` with its argument.
    """
    try:
        return run(False)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        return run(True)


def gradients_of(
    loss: torch.Tensor, parameters: Sequence[torch.Tensor], *, plain: bool
) -> tuple[torch.Tensor | None, ...]:
    """Return d(loss)/d(parameter) for each, None for what the loss does not reach; their ``.grad`` stays as it was.

    Args:
        loss: a scalar.
        parameters: leaves.
        plain: run ``loss.backward()`` rather than `torch.autograd.grad`.
    """
    if not plain:
        return torch.autograd.grad(loss, parameters, allow_unused=True)
    kept = [p.grad for p in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        return tuple(p.grad for p in parameters)
    finally:
        for parameter, gradient in zip(parameters, kept, strict=True):
            parameter.grad = gradient
