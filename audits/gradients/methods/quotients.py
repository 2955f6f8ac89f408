"""Difference quotients of many elements of one tensor at once: one, two or four values an element."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from audits.gradients.methods.batched import BatchedElements, PlainElements
from audits.gradients.methods.romberg import FIRST_STEP, Estimate, noise_part

#: Elements in a sample.
SAMPLE = 64

#: The largest truncation among a sample of 64 elements, times this, is taken for every element of the tensor: with 64
#: independent draws another one exceeds their maximum with probability 1/65, and four times it hardly ever.
SAMPLE_CAUTION = 4.0

#: Noise of a forward difference times its step: 6 standard deviations of ``f(s) - f(0)``.
FORWARD_NOISE = 6 * math.sqrt(2)

#: A forward difference takes no step below this share of the central one: theta + s would be rounded too coarsely.
SMALLEST_FORWARD = 1e-4

Values = np.ndarray


class Differences:
    """Derivatives of f by the elements of a tensor, each with a bound, in units of theta.

    ========  ==================================================  =====================================================
    values    derivative                                          truncation in its bound
    ========  ==================================================  =====================================================
    1         ``(f(s) - f(0)) / s``                               ``4 s/2 max |f''|`` of a sample
    2         ``(f(h/2) - f(-h/2)) / h``                          ``4 max |D(h/2) - R1|`` of a sample
    4         ``R1 = (4 D(h/2) - D(h)) / 3``                      ``|D(h/2) - R1|``, the element's own
    ========  ==================================================  =====================================================

    ``s`` makes the truncation of a forward difference as large as its noise. Four values until `sample` finds that
    fewer do.

    Args:
        elements: evaluates f.
        step: h, in units of theta.
        sigma: noise of f.
    """

    def __init__(self, elements: BatchedElements | PlainElements, step: float, sigma: float) -> None:
        self._elements, self._step, self._sigma = elements, step, sigma
        self._noise = noise_part(sigma, 2 * FIRST_STEP) * FIRST_STEP / step
        self._estimates: Callable[[list[int]], tuple[Values, Values]] = self._richardson

    def of(self, indices: list[int]) -> list[Estimate]:
        """Return the estimates of some elements, at most `CHUNK` of them."""
        values, bounds = self._estimates(indices)
        return [Estimate(v, b, self._noise, FIRST_STEP) for v, b in zip(values.tolist(), bounds.tolist(), strict=True)]

    def sample(self, indices: list[int], wanted: float) -> None:
        """Choose the cheapest difference whose bound is ``wanted`` at most, by the truncation of these elements."""
        half = self._step / 2
        whole = self._central(indices, self._step)
        above, below = self._both_ways(indices, half)
        base = self._elements.base
        central = (above - below) / self._step
        truncation = SAMPLE_CAUTION * float(np.abs((4 * central - whole) / 3 - central).max())
        curvature = SAMPLE_CAUTION * float(np.abs(above - 2 * base + below).max() + 6 * 2 * self._sigma) / half**2
        forward = math.sqrt(2 * FORWARD_NOISE * self._sigma / curvature) if curvature else half
        forward = min(max(forward, SMALLEST_FORWARD * self._step), half)
        bound = curvature * forward / 2 + FORWARD_NOISE * self._sigma / forward
        if bound <= wanted:
            self._estimates = lambda indices: self._forward(indices, forward, base, bound)
        elif truncation + self._noise <= wanted:
            self._estimates = lambda indices: self._shared(indices, half, truncation)

    def _both_ways(self, indices: list[int], step: float) -> tuple[Values, Values]:
        steps = np.repeat([step, -step], len(indices))
        above, below = np.split(self._elements.values(indices * 2, steps), 2)
        return above, below

    def _central(self, indices: list[int], step: float) -> Values:
        above, below = self._both_ways(indices, step)
        return np.asarray((above - below) / (2 * step))

    def _forward(self, indices: list[int], step: float, base: float, bound: float) -> tuple[Values, Values]:
        steps = np.full(len(indices), step)
        values = (self._elements.values(indices, steps) - base) / self._elements.moved(indices, step)
        return values, np.full(len(indices), bound)

    def _shared(self, indices: list[int], step: float, truncation: float) -> tuple[Values, Values]:
        return self._central(indices, step), np.full(len(indices), truncation + self._noise)

    def _richardson(self, indices: list[int]) -> tuple[Values, Values]:
        first, second = self._central(indices, self._step), self._central(indices, self._step / 2)
        value = (4 * second - first) / 3
        return value, np.abs(value - second) + self._noise
