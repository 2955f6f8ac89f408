"""Whether a small error of a large tensor is a large error of a few of its elements."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from audits.gradients.methods.probe import Probe, Prober
from audits.lanes.arithmetic import norm
from audits.lanes.directions import Given, values_of

#: Rounding inside an operator spreads in proportion to the gradient (a float32 constant is off by 1e-7 everywhere). An
#: error this large relative to the gradient of the elements it sits in is a wrong formula, however small their share of
#: the whole tensor. A thousand times the rounding rule's 1e-6 leaves room for elements whose terms cancel.
CONCENTRATED = 1e-3


@dataclass(frozen=True)
class Concentration:
    """Elements ``first`` to ``last`` (flat, inclusive) whose gradient is off by ``relative``."""

    first: int
    last: int
    relative: float
    probe: Probe

    def describe(self) -> str:
        """Return ``element 7`` or ``elements 7 to 9``."""
        return f"element {self.first}" if self.first == self.last else f"elements {self.first} to {self.last}"


def find_concentration(prober: Prober, name: str, step: float) -> Concentration | None:
    """Halve a tensor towards its error until the error is large relative to the gradient there, or out of sight.

    At each level both halves are probed along their part of one direction; the one whose residual exceeds its bound
    and is larger relative to ``s ||g||`` of its elements is followed. ``2 log2(n)`` probes at most.

    Args:
        prober: probes around theta.
        name: the tensor, whose error was confirmed.
        step: the first step h.

    Returns:
        The elements, confirmed along a fresh direction; None when the error stays spread thin or goes below the bound.
    """
    with prober.point.gradients.holding([name]):
        return _find(prober, name, step)


def _find(prober: Prober, name: str, step: float) -> Concentration | None:
    gradient = prober.point.gradients[name]
    scale = prober.scales([name], step)[name]
    base = values_of(prober.direction({name: scale}), name)
    low, high = 0, base.numel()
    while high - low > 1:
        middle = (low + high) // 2
        halves = []
        for first, end in ((low, middle), (middle, high)):
            probe = prober.along(Given({name: _window(base, first, end)}), step)
            if probe.exceeds:
                halves.append((_relative(probe, gradient, scale, first, end), first, end, probe))
        if not halves:
            return None
        relative, low, high, probe = max(halves, key=lambda half: half[0])
        if relative >= CONCENTRATED:
            fresh = values_of(prober.direction({name: scale}), name)
            again = prober.along(Given({name: _window(fresh, low, high)}), step)
            if again.exceeds and _relative(again, gradient, scale, low, high) >= CONCENTRATED / 3:
                return Concentration(low, high - 1, relative, probe)
            return None
    return None


def _window(vector: torch.Tensor, first: int, end: int) -> torch.Tensor:
    part = torch.zeros_like(vector)
    part.view(-1)[first:end] = vector.reshape(-1)[first:end]
    return part


def _relative(probe: Probe, gradient: torch.Tensor | None, scale: float, first: int, end: int) -> float:
    size = 0.0 if gradient is None else scale * norm(gradient.reshape(-1)[first:end])
    return probe.residual / size if size else float("inf")
