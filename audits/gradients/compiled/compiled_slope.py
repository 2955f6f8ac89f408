"""The derivative of a compiled loss in float64: the same seed before every evaluation, the steps small for kinks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from audits.checks.gradient import KINK_SHARE
from audits.gradients.methods.noise import measure_noise
from audits.gradients.methods.probe import SMALLEST_RMS
from audits.gradients.methods.romberg import Estimate, romberg_at
from audits.lanes.arithmetic import norm
from audits.lanes.directions import NOWHERE, Direction, Random, Unit, values_of
from audits.lanes.gradient_sums import dot
from audits.lanes.lifted_loss import one_number
from audits.lanes.problem import UNIT_ROUNDOFF, Problem, as_real, differentiate
from audits.live.subject import LivePhase, Subject
from audits.outcomes import Lane

#: Steps of the difference quotient, relative to the parameters. Kinks cannot be held in compiled code: what one that is
#: crossed adds to the quotient falls with the step, a wrong gradient stays.
STEPS = (1e-4, 1e-4 / 64)

#: A pass needs a bound below this share of the slope: noise above it (float32 inside the compiled code) hides too much.
RESOLVED = 0.1


@dataclass(frozen=True)
class Slope:
    """One directional derivative of the compiled loss.

    Attributes:
        expected: what autograd says.
        estimate: the difference quotient.
        allowed: how far apart they may be.
        size: what the tensors' own slopes add up to, their signs at random: ``sqrt(sum (g v)^2)``.
    """

    expected: float
    estimate: Estimate
    allowed: float
    size: float

    @property
    def residual(self) -> float:
        """``|D - <g, v>|``."""
        return abs(self.estimate.value - self.expected)

    @property
    def exceeds(self) -> bool:
        """Whether the residual is beyond what is allowed, or no number."""
        return not self.residual <= self.allowed

    @property
    def resolved(self) -> bool:
        """Whether an error of a tenth of the slope would have shown."""
        return self.allowed <= RESOLVED * self.size


class CompiledLoss:
    """The compiled loss around a point of the float64 lane."""

    def __init__(self, subject: Subject, phase: LivePhase, problem: Problem, here: dict[str, torch.Tensor]) -> None:
        self._subject, self._phase, self._problem, self._here = subject, phase, problem, here
        self._before = {name: tensor.detach().clone() for name, tensor in problem.tensors.items()}
        self._place(NOWHERE, 0.0)
        loss = self._loss()
        found = differentiate(loss, problem.tensors, hooked=problem.hooked)
        self._gradients = {n: None if g is None else as_real(g.detach()) for n, g in found.items()}

    def restore(self) -> None:
        """Put the tensors back."""
        for name, value in self._before.items():
            self._problem.tensors[name].data.copy_(value)

    def slope(self, names: list[str], seed: int) -> Slope:
        """Return the derivative along a random direction; at the smaller step where the larger one's exceeds."""
        reals = {name: as_real(value) for name, value in self._here.items()}
        scales = {n: max(norm(reals[n]) / max(reals[n].numel(), 1) ** 0.5, SMALLEST_RMS) for n in names}
        direction = Random(Unit(seed + 89, 0), reals, scales)
        gradients = {n: g for n, g in self._gradients.items() if g is not None and n in scales}
        total = math.fsum(direction.factor(n) * dot(g, direction, n)[0] for n, g in gradients.items())
        spread = math.sqrt(sum(norm(g * values_of(direction, n)) ** 2 for n, g in gradients.items()))
        found: Slope | None = None
        for step in STEPS:
            estimate = self._estimate(direction, step)
            found = Slope(total, estimate, estimate.bound + KINK_SHARE.value * spread, spread)
            if not found.exceeds:
                break
        assert found is not None
        return found

    def _estimate(self, direction: Direction, step: float) -> Estimate:
        along = self._along(direction)
        roundoff = UNIT_ROUNDOFF[Lane.FLOAT64]
        noise = measure_noise(
            lambda centre, spacing, count: [along(centre + i * spacing) for i in range(count)], step, roundoff
        )
        return romberg_at(along, step, noise.sigma)

    def _along(self, direction: Direction) -> Callable[[float], float]:
        def value(distance: float) -> float:
            self._place(direction, distance)
            return float(self._loss().detach())

        return value

    def _place(self, direction: Direction, distance: float) -> None:
        moving = set(direction.names)
        for name, value in self._here.items():
            moved = as_real(value)
            if name in moving:
                moved = moved.add(direction.whole(name), alpha=direction.factor(name) * distance)
            as_real(self._problem.tensors[name].data).copy_(moved)

    def _loss(self) -> torch.Tensor:
        self._problem.before()
        with torch.enable_grad():
            return one_number(self._subject.loss(self._phase, self._problem.batches))
