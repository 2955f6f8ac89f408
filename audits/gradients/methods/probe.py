"""Directions through many tensors, the probes along them, and what they would have found."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from audits.gradients.methods.noise import RELATIVE_SPACING, WIDE_SPACING, Noise, measure_noise
from audits.gradients.methods.romberg import Estimate, noise_part, romberg, romberg_at
from audits.lanes.directions import Direction, Random, Unit
from audits.lanes.evaluation import Point
from audits.lanes.gradient_sums import Products
from audits.lanes.problem import UNIT_ROUNDOFF
from audits.lanes.program import BranchMismatchError
from audits.outcomes import Lane

#: Tensors smaller than this (zero-initialised ones) move by this much instead: the floor of rms_t.
SMALLEST_RMS = 1e-2

#: A tensor's slope c must stand this far above the noise part of B for a limit of 1e-4 (45 B / c).
SLOPE_OVER_NOISE = 4.5e5

#: Prior guess of the noise in units of u |f|, before it is measured (measured: 1.0 to 1.2 on healthy nets).
TYPICAL_NOISE = 1.2

#: A second measurement of the noise changes the verdict when it is larger by this factor.
LARGER_NOISE = 1.5

#: Measurements of a rough loss's noise, of which the largest counts: one alone is 0.44 of it at its first percentile.
ROUGH_MEASUREMENTS = 3

#: Distance, in units of t, at which the steps of a float32 inside show: hundreds of its roundings, and the differences
#: of a smooth function of the third order and more, 1e-15, are below float64's own noise.
STAIR_SPACING = 1e-5

#: Steps that a rough loss is tried at.
LADDER = (1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125)

#: Probability with which an error at the detection limit may be missed by all probes together.
MISS_PROBABILITY = 1e-3

#: ``P(one probe misses) <= 1.42 B / ||s e||``: the density of ``sum s e_i sign_i U[1/2, 3/2]`` is at most
#: 0.71 / ||s e|| per unit, times the interval [-B, B].
MISS_FACTOR = 1.42

#: Standard deviation of the rounding of a stored ``theta_i + t v_i``, in units of u |theta_i|: an ulp is at most 2 u
#: times the value, and uniform rounding within it deviates by ulp / sqrt(12).
STORAGE_ROUNDING = 2 / math.sqrt(12)

#: Rounding of the products and sums in <g, v>, in units of u sum |g v|.
DOT_ROUNDING = 8.0


@dataclass(frozen=True)
class Probe:
    """One direction's comparison.

    Attributes:
        direction: v.
        estimate: D and its bound without the dot product's rounding.
        autograd: <g, v>, what autograd says.
        bound: B.
    """

    direction: Direction
    estimate: Estimate
    autograd: float
    bound: float

    @property
    def residual(self) -> float:
        """``r = |D - <g, v>|``."""
        return abs(self.estimate.value - self.autograd)

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
        self._zero = frozenset(point.rounded)
        self.slope_norms = {n: 0.0 if n in point.rounded else point.gradients.norms[n] for n in point.names}
        self.rms = {name: rms(point.count(name), point.theta_norms[name]) for name in point.names}
        self.sigma = max(self.problem.roundoff * abs(point.value) * TYPICAL_NOISE, point.spread)
        self._measured = False
        #: Whether the loss has steps of a coarser arithmetic in it (`coarsen`).
        self.rough = False

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

    def direction(self, scales: Mapping[str, float]) -> Random:
        """Return ``v = s_t * sign * U[1/2, 3/2]``, another one at every call.

        Uniform sizes rather than signs alone: signs miss a pair of errors (+d, -d) half of the time; Gaussian ones
        would miss single elements whose draw is small.
        """
        self._draws += 1
        return self.point.random(Unit(self._seed, self._draws), scales)

    def announce(self, names: Sequence[str], count: int) -> None:
        """Say that the next probes are of these tensors: one backward serves them all."""
        self.point.gradients.prepare([Unit(self._seed, self._draws + i + 1) for i in range(count)], names)

    def everywhere(self, step: float) -> Random:
        """Return a direction through every tensor of the point.

        Noise is measured along this one: where only a tensor without effect moves (a bias before a BatchNorm), rounding
        flips rarely, and eight values that happen to be equal would say that there is none.
        """
        return self.direction(self.scales(self.point.names, step))

    def measure(self, direction: Direction, step: float) -> Mapping[float, float]:
        """Measure the noise once, later rounds reuse it; return what is now known of ``t -> f(theta + t v)``.

        Neighbouring values are told apart by moving at most a piece of each tensor, the one that matters most: all that
        is computed downstream of any of them is rounded anew. What is left out is the rounding of the stored elements
        that stay, ``0.58 u ||theta g||`` in the loss, which is added.
        """
        if self._measured:
            return {}
        found = self._noise(lambda *place: self.point.near(direction, *place), step)
        stored = STORAGE_ROUNDING * self.problem.roundoff * self.point.gradients.weighted_norm(self._zero)
        self.sigma = max(math.hypot(found.sigma, stored), self.point.spread)
        self._measured = True
        return found.known

    def remeasure(self, direction: Direction, step: float) -> bool:
        """Measure the noise at a wider spacing, everything moving; return whether it is larger than was thought."""

        def neighbours(centre: float, spacing: float, count: int) -> list[float]:
            return [self.point.along(direction, centre + i * spacing) for i in range(count)]

        wide = self._noise(neighbours, step, WIDE_SPACING).sigma
        larger = wide > LARGER_NOISE * self.sigma
        self.sigma = max(self.sigma, wide)
        return larger

    def noise_of_stairs(self, step: float) -> float:
        """Return the noise, in units of u |f|, at a distance that float32 would have had to round over.

        The neighbours that the noise is measured at lie closer than float32 can tell apart: an operator that takes a
        root in float32, say, is constant there, and the loss looks smooth.
        """
        direction = self.everywhere(step)

        def neighbours(centre: float, spacing: float, count: int) -> list[float]:
            return [self.point.along(direction, centre + i * spacing) for i in range(count)]

        scale = self.problem.roundoff * abs(self.point.value)
        return self._noise(neighbours, step, STAIR_SPACING / step).sigma / scale if scale else 0.0

    @property
    def noise_ratio(self) -> float:
        """The noise in units of u |f|: about 1 in the lane's own arithmetic; 0 before it was measured."""
        scale = self.problem.roundoff * abs(self.point.value)
        return self.sigma / scale if self._measured and scale else 0.0

    def coarsen(self, step: float) -> None:
        """Measure the noise of a loss that is computed in float32 somewhere inside.

        Below float32's spacing such a loss is a staircase, on which near neighbours often share a step: noise measured
        there is too small, by 2.4 where 3e-9 lies between them. From ten units in the last place of float32 on it is
        the same at every spacing.
        """
        for _ in range(ROUGH_MEASUREMENTS):
            direction = self.everywhere(step)

            def neighbours(centre: float, spacing: float, count: int, direction: Direction = direction) -> list[float]:
                return [self.point.along(direction, centre + i * spacing) for i in range(count)]

            found = measure_noise(neighbours, step, UNIT_ROUNDOFF[Lane.FLOAT32], self.point.value_roundoff)
            self.sigma = max(self.sigma, found.sigma)
        self.rough = True

    def best_step(self, scales: Mapping[str, float]) -> float:
        """Return the step with the tightest bound along one direction through some tensors, of 1, 1/2, ... 1/32.

        Their differences share their evaluations: 16 for six of them.
        """
        direction = self.direction(scales)
        known: dict[float, float] = {}

        def function(t: float) -> float:
            if t not in known:
                known[t] = self.point.along(direction, t)
            return known[t]

        bounds: dict[float, float] = {}
        for step in LADDER:
            try:
                estimate = romberg_at(function, step, self.sigma)
            except BranchMismatchError:
                continue
            bounds[step] = estimate.bound if math.isfinite(estimate.bound) else math.inf
        return min(bounds, key=lambda step: bounds[step]) if bounds else LADDER[-1]

    def _noise(
        self, neighbours: Callable[[float, float, int], list[float]], step: float, spacing: float = RELATIVE_SPACING
    ) -> Noise:
        return measure_noise(neighbours, step, self.problem.roundoff, self.point.value_roundoff, spacing)

    def probe(self, scales: Mapping[str, float], step: float) -> Probe:
        """Compare along one new direction; the noise is measured on the first."""
        self.measure_once(scales, step)
        return self.along(self.direction(scales), step)

    def measure_once(self, scales: Mapping[str, float], step: float) -> None:
        """Measure the noise before probes of some tensors only; probes of all do it on the way."""
        if not self._measured and len(scales) < len(self.point.names):
            self.measure(self.everywhere(step), step)

    def again(self, probe: Probe, step: float) -> Probe:
        """Compare along the same direction with one given step."""
        direction = probe.direction
        products = self.point.gradients.products(direction, self._zero)
        return self._compare(
            direction, romberg_at(lambda t: self.point.along(direction, t), step, self.sigma), products
        )

    def along(self, direction: Direction, step: float) -> Probe:
        """Compare along a direction of the caller's."""
        products = self.point.gradients.products(direction, self._zero)
        known: Mapping[float, float] = {}
        if not self._measured and len(direction.names) == len(self.point.names):
            known = self.measure(direction, step)
        elif not self._measured:
            self.measure(self.everywhere(step), step)

        def function(t: float) -> float:
            return known[t] if t in known else self.point.along(direction, t)

        return self._compare(direction, romberg(function, step, self.sigma), products)

    def _compare(self, direction: Direction, estimate: Estimate, products: Products) -> Probe:
        bound = estimate.bound + DOT_ROUNDING * self.problem.roundoff * products.absolute
        return Probe(direction, estimate, products.total, bound)

    def limit(self, name: str, scale: float, bounds: Sequence[float]) -> float:
        """Return the detection limit ``eps_t``, relative; infinite for a zero gradient."""
        slope = scale * self.slope_norms[name]
        return limit_factor(len(bounds)) * max(bounds) / slope if slope > 0 else math.inf


def rms(count: int, its_norm: float) -> float:
    """Return the root mean square of a tensor's elements, at least `SMALLEST_RMS`."""
    return max(its_norm / math.sqrt(max(count, 1)), SMALLEST_RMS)
