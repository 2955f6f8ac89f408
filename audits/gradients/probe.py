"""Directions through many tensors, the probes along them, and what they would have found."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from audits.gradients.noise import WIDE_SPACING, measure_noise
from audits.gradients.romberg import Estimate, noise_part, romberg, romberg_at
from audits.lanes.evaluation import Point, dot, norm

#: Tensors smaller than this (zero-initialised ones) move by this much instead: the floor of rms_t.
SMALLEST_RMS = 1e-2

#: A tensor's slope c must stand this far above the noise part of B for a limit of 1e-4 (45 B / c).
SLOPE_OVER_NOISE = 4.5e5

#: Prior guess of the noise in units of u |f|, before it is measured (measured: 1.0 to 1.2 on healthy nets).
TYPICAL_NOISE = 1.2

#: A second measurement of the noise changes the verdict when it is larger by this factor.
LARGER_NOISE = 1.5

#: Probability with which an error at the detection limit may be missed by all probes together.
MISS_PROBABILITY = 1e-3

#: ``P(one probe misses) <= 1.42 B / ||s e||``: the density of ``sum s e_i sign_i U[1/2, 3/2]`` is at most
#: 0.71 / ||s e|| per unit, times the interval [-B, B].
MISS_FACTOR = 1.42

#: Rounding of the products and sums in <g, v>, in units of u sum |g v|.
DOT_ROUNDING = 8.0


@dataclass(frozen=True)
class Probe:
    """One direction's comparison.

    Attributes:
        direction: v by name.
        estimate: D and its bound without the dot product's rounding.
        expected: <g, v>, what autograd says.
        bound: B.
    """

    direction: Mapping[str, torch.Tensor]
    estimate: Estimate
    expected: float
    bound: float

    @property
    def residual(self) -> float:
        """``r = |D - <g, v>|``."""
        return abs(self.estimate.value - self.expected)

    @property
    def exceeds(self) -> bool:
        """Whether the residual is beyond the bound (or no number at all)."""
        return not self.residual <= self.bound


def limit_factor(probes: int) -> float:
    """Return x such that an error ``||s e|| = x B`` is missed by all probes with probability 0.1 % at most.

    ``x = 1.42 * 0.001^(-1/K)``: 45 for two probes.
    """
    return float(MISS_FACTOR * MISS_PROBABILITY ** (-1.0 / probes))


class Prober:
    """Probes around one point."""

    def __init__(self, point: Point, seed: int) -> None:
        self.point = point
        self.problem = point.problem
        self._seed = seed
        self._draws = 0
        self._gradients = {name: g for name, g in point.gradients.items() if name not in point.rounded}
        self.slope_norms = {name: norm(self._gradients.get(name)) for name in point.names}
        self.rms = {name: rms(point.theta(name)) for name in point.names}
        self.sigma = max(self.problem.roundoff * abs(point.value) * TYPICAL_NOISE, point.spread)
        self._measured = False

    def scales(self, names: Sequence[str], step: float) -> dict[str, float]:
        """Return ``s_t = min(rms_t, c / ||g_t||)``, rms_t where the gradient is zero.

        ``c = max(median(rms_t ||g_t||), 4.5e5 * noise part of B)`` over the tensors whose gradient is not zero: no
        tensor's slope drowns the others', and none is scaled below what the noise resolves.
        """
        slopes = sorted(self.rms[n] * self.slope_norms[n] for n in names if self.slope_norms[n] > 0)
        if not slopes:
            return {name: self.rms[name] for name in names}
        level = max(slopes[len(slopes) // 2], SLOPE_OVER_NOISE * noise_part(self.sigma, step))
        return {
            name: min(self.rms[name], level / self.slope_norms[name]) if self.slope_norms[name] > 0 else self.rms[name]
            for name in names
        }

    def direction(self, scales: Mapping[str, float]) -> dict[str, torch.Tensor]:
        """Return ``v = s_t * sign * U[1/2, 3/2]``, another one at every call.

        Uniform sizes rather than signs alone: signs miss a pair of errors (+d, -d) half of the time; Gaussian ones
        would miss single elements whose draw is small.
        """
        self._draws += 1
        made = {}
        for position, (name, scale) in enumerate(scales.items()):
            theta = self.point.theta(name)
            generator = torch.Generator(device=theta.device)
            generator.manual_seed(hash((self._seed, self._draws, position)) % 2**63)
            vector = torch.empty_like(theta).uniform_(-1.0, 1.0, generator=generator)
            made[name] = vector.add_(vector.sign(), alpha=0.5).mul_(scale)
        return made

    def everywhere(self, step: float) -> dict[str, torch.Tensor]:
        """Return a direction through every tensor of the point.

        Noise is measured along this one: where only a tensor without effect moves (a bias before a BatchNorm), rounding
        flips rarely, and eight values that happen to be equal would say that there is none.
        """
        return self.direction(self.scales(self.point.names, step))

    def measure(self, direction: Mapping[str, torch.Tensor], step: float) -> None:
        """Measure the noise once; later rounds reuse it."""
        if self._measured:
            return
        measured = measure_noise(
            lambda t: self.point.along(direction, t), step, self.problem.roundoff, self.point.value_roundoff
        )
        self.sigma = max(measured, self.point.spread)
        self._measured = True

    def remeasure(self, direction: Mapping[str, torch.Tensor], step: float) -> bool:
        """Measure the noise at a wider spacing; return whether it is larger than was thought."""
        wide = measure_noise(
            lambda t: self.point.along(direction, t),
            step,
            self.problem.roundoff,
            self.point.value_roundoff,
            relative_spacing=WIDE_SPACING,
        )
        larger = wide > LARGER_NOISE * self.sigma
        self.sigma = max(self.sigma, wide)
        return larger

    def probe(self, scales: Mapping[str, float], step: float) -> Probe:
        """Compare along one new direction; the noise is measured on the first."""
        direction = self.direction(scales)
        if not self._measured:
            self.measure(direction if len(scales) == len(self.point.names) else self.everywhere(step), step)
        return self._compare(direction, romberg(lambda t: self.point.along(direction, t), step, self.sigma))

    def again(self, probe: Probe, step: float) -> Probe:
        """Compare along the same direction with one given step."""
        direction = probe.direction
        return self._compare(direction, romberg_at(lambda t: self.point.along(direction, t), step, self.sigma))

    def along(self, direction: Mapping[str, torch.Tensor], step: float) -> Probe:
        """Compare along a direction of the caller's."""
        if not self._measured:
            self.measure(self.everywhere(step), step)
        return self._compare(direction, romberg(lambda t: self.point.along(direction, t), step, self.sigma))

    def _compare(self, direction: Mapping[str, torch.Tensor], estimate: Estimate) -> Probe:
        expected, absolute = dot(self._gradients, direction)
        bound = estimate.bound + DOT_ROUNDING * self.problem.roundoff * absolute
        return Probe(direction, estimate, expected, bound)

    def limit(self, name: str, scale: float, bounds: Sequence[float]) -> float:
        """Return the detection limit ``eps_t``, relative; infinite for a zero gradient."""
        slope = scale * self.slope_norms[name]
        return limit_factor(len(bounds)) * max(bounds) / slope if slope > 0 else math.inf


def rms(tensor: torch.Tensor) -> float:
    """Return the root mean square of a tensor's elements, at least `SMALLEST_RMS`."""
    return max(norm(tensor) / math.sqrt(max(tensor.numel(), 1)), SMALLEST_RMS)
