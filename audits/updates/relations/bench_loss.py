"""The loss that an optimizer is run on: of each tensor alone, its gradient where the tensor is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from audits.structures import outputs_of

#: Sizes of ``c_t``: unit, flipped, large after small and small after large (amsgrad shows only there), zero, unit.
PULLS = (1.0, -0.5, 1e-2, 30.0, 0.0, 1e-2, 1.0, -1.0)

#: Steps where fewer move nothing: rules that first gather gradients (AdaShift, ten of them).
LATE = 24

#: Every so manieth element starts so much smaller: rules that train only small weights (SaRA) have some.
SMALL_EVERY, SMALL = 5, 1e-4


@dataclass(frozen=True)
class Leaf:
    """A tensor, float64: where it starts, ``c_t`` for every step (steps first), and ``h``."""

    start: torch.Tensor
    pull: torch.Tensor
    curve: torch.Tensor

    def flat(self) -> Leaf:
        """Return the same numbers in one dimension."""
        return Leaf(self.start.reshape(-1), self.pull.reshape(len(self.pull), -1), self.curve.reshape(-1))

    def part(self, dimension: int, begin: int, end: int) -> Leaf:
        """Return a range along the first (0) or the last (-1) dimension."""
        width = end - begin
        return Leaf(
            self.start.narrow(dimension, begin, width),
            self.pull.narrow(1 if dimension == 0 else -1, begin, width),
            self.curve.narrow(dimension, begin, width),
        )


def leaf(shape: tuple[int, ...], generator: torch.Generator, steps: int = LATE) -> Leaf:
    """Draw a tensor's problem; gradients are of the sizes of `PULLS`, over and over."""
    scales = torch.tensor([PULLS[i % len(PULLS)] for i in range(steps)], dtype=torch.float64)
    draw = torch.randn((steps, *shape), dtype=torch.float64, generator=generator)
    curve = 0.05 + 0.1 * torch.rand(shape, dtype=torch.float64, generator=generator)
    start = torch.randn(shape, dtype=torch.float64, generator=generator)
    start.reshape(-1)[::SMALL_EVERY] *= SMALL
    return Leaf(start, draw * scales.reshape(-1, *(1 for _ in shape)), curve)


class DtypeListener(TorchDispatchMode):
    """Notes the floating dtypes of what is computed, single numbers apart."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in outputs_of(found):
            if isinstance(value, torch.Tensor) and value.numel() > 1 and value.is_floating_point():
                self.dtypes.add(value.dtype)
        return found


class Problem:
    """The loss of a run, and its gradients where the weights are."""

    def __init__(
        self, leaves: Mapping[str, Leaf], device: torch.device, dtype: torch.dtype, sign: float, graph: bool
    ) -> None:  # fmt: skip
        self._leaves = leaves
        self._device, self._dtype, self._sign, self._graph = device, dtype, sign, graph

    def differentiate(self, loud: Mapping[str, nn.Parameter], step: int) -> torch.Tensor:
        """Give every tensor its gradient where it is now, and return the loss."""
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for name, parameter in loud.items():
            pull = self._leaves[name].pull[step].to(self._device, self._dtype)
            curve = self._leaves[name].curve.to(self._device, self._dtype)
            if self._graph:
                loss = self._sign * (pull * parameter + 0.5 * curve * parameter * parameter).sum()
                (parameter.grad,) = torch.autograd.grad(loss, parameter, create_graph=True)
                total = total + loss.detach()
            else:
                value = parameter.detach()
                parameter.grad = self._sign * (pull + curve * value)
                total = total + self._sign * ((pull + 0.5 * curve * value) * value).sum()
        return total
