"""A directional derivative by Romberg extrapolation of central differences, with its bound."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from audits.lanes.program import BranchMismatchError

#: First step, relative to a direction whose elements have the size of the tensors' own.
FIRST_STEP = 3e-3

#: No step below this: rounding of theta itself would dominate.
SMALLEST_STEP = 1e-7

#: Steps shrink by this factor while truncation dominates.
SHRINK = 8.0

#: Truncation may exceed the noise part this often before the step shrinks.
BALANCE = 3.0

#: Noise part of the bound: 6 standard deviations of D. The largest weight in D is 64/45 = 1.42 (rounded up to 1.44 for
#: the two smaller ones: sqrt(64^2 + (20/2)^2 + (1/4)^2) / 45) on (f(+h/4) - f(-h/4)) / (2 h/4), whose standard
#: deviation is sigma / (sqrt(2) h/4).
NOISE_WEIGHT = 6 * 1.44


#: Beyond the first step the table's last column can agree by chance: ``|R1 - R1'| = 15 |D - R1|``, the column before,
#: bounds the truncation there (with the last column 2 of 12 healthy runs at loss + 1e9 exceeded at h = 0.5).
LARGE_STEP_CAUTION = 15.0


@dataclass(frozen=True)
class Estimate:
    """A derivative with its error bound.

    Attributes:
        value: D.
        bound: truncation and noise part.
        noise: the noise part alone.
        step: the step h it was taken at.
    """

    value: float
    bound: float
    noise: float
    step: float


def noise_part(sigma: float, step: float) -> float:
    """Return ``6 * 1.44 sigma / (sqrt(2) h/4)``."""
    return NOISE_WEIGHT * sigma / (math.sqrt(2) * step / 4)


def romberg_at(function: Callable[[float], float], step: float, sigma: float) -> Estimate:
    """Return the derivative of ``function`` at 0 with one step.

    ``D_k = (f(h_k) - f(-h_k)) / (2 h_k)`` for ``h_k = h, h/2, h/4``; ``D = (64 D3 - 20 D2 + D1) / 45``,
    ``R1 = (4 D3 - D2) / 3``; the bound is ``|D - R1| + 6 * 1.44 sigma / (sqrt(2) h/4)``, its first part 15 times that
    for steps above the first.
    """
    first, second, third = (_central(function, step / divisor) for divisor in (1.0, 2.0, 4.0))
    value = (64 * third - 20 * second + first) / 45
    noise = noise_part(sigma, step)
    caution = LARGE_STEP_CAUTION if step > FIRST_STEP else 1.0
    return Estimate(value, caution * abs(value - (4 * third - second) / 3) + noise, noise, step)


def romberg(function: Callable[[float], float], step: float, sigma: float) -> Estimate:
    """Return the derivative at 0, the step shrunk while truncation dominates; the tightest bound wins.

    Raises:
        BranchMismatchError: at no step the function keeps the branch of theta, or it is nowhere finite.
    """
    best: Estimate | None = None
    mismatch: BranchMismatchError | None = None
    while step >= SMALLEST_STEP:
        try:
            estimate = romberg_at(function, step, sigma)
        except BranchMismatchError as error:
            mismatch = error
            step /= SHRINK
            continue
        if math.isfinite(estimate.bound):
            if best is None or estimate.bound < best.bound:
                best = estimate
            if estimate.bound - estimate.noise <= BALANCE * estimate.noise or estimate.noise > best.bound:
                break
        step /= SHRINK
    if best is None:
        raise mismatch or BranchMismatchError("the loss is not finite at any step around theta")
    return best


def _central(function: Callable[[float], float], step: float) -> float:
    return (function(step) - function(-step)) / (2 * step)
