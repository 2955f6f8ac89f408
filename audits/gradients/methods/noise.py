"""The noise of a computed function, measured: ECnoise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

#: Function values at each of the two places, of whose differences the level is estimated together: m + 1 = 6, as the
#: reference recommends (6 to 8).
VALUES = 6

#: An estimate from twelve values is a little low in the median (0.92, simulated), and 0.37 at its first percentile;
#: times this it is 1.1 and 0.44.
ESTIMATE_CAUTION = 1.2

#: Spacing of the values relative to the probe's step: far below it, far above the rounding of theta.
RELATIVE_SPACING = 1e-6

#: Second spacing, tried when an exceedance is not confirmed: rounding that changes slowly with theta (a bias whose
#: effect a BatchNorm takes out again) is the same at neighbouring points and shows only at this distance.
WIDE_SPACING = 1e-2

#: The spacing is at least so many roundoffs of theta, where the arithmetic is too coarse for the above (float32).
SPACING_ROUNDOFFS = 1e4

#: Widen the spacing tenfold while half of the values are equal, at most so often.
WIDENINGS = 4


#: ``(centre, spacing, count) -> [f(centre), f(centre + spacing), ...]``.
Neighbours = Callable[[float, float, int], list[float]]


@dataclass(frozen=True)
class Noise:
    """A measured noise level and the values it came from.

    Attributes:
        sigma: standard deviation of the noise.
        known: t -> f(theta + t v) at the two centres, which the probe needs as well.
    """

    sigma: float
    known: Mapping[float, float]


def difference_noise(*tables: Sequence[float]) -> float:
    """Return the noise level of equally spaced function values, estimated over one table or over several together.

    ``sigma_k^2 = gamma_k * mean_i (Delta^k f_i)^2`` with ``gamma_k = (k!)^2 / (2k)!``; the level is sigma_k of the
    first k whose successors agree within a factor of 4 and whose differences change sign, the median of the upper half
    of the levels when none does.

    Args:
        tables: m + 1 function values at equally spaced points each.

    Returns:
        The standard deviation of the noise, 0 when all values of every table are equal.

    Reference:
        J. J. More and S. M. Wild, Estimating computational noise, SIAM J. Sci. Comput. 33 (2011).
    """
    differences = [list(values) for values in tables]
    levels: list[float] = []
    signs: list[bool] = []
    gamma = 1.0
    for k in range(1, len(tables[0])):
        differences = [[b - a for a, b in itertools.pairwise(values)] for values in differences]
        together = [d for values in differences for d in values]
        gamma *= 0.5 * k / (2 * k - 1)
        levels.append(math.sqrt(gamma * math.fsum(d * d for d in together) / len(together)))
        signs.append(min(together) < 0 < max(together))
    for k in range(len(levels) - 2):
        window = levels[k : k + 3]
        if signs[k] and max(window) <= 4 * min(window):
            return levels[k]
    upper = sorted(levels[len(levels) // 2 :])
    return upper[len(upper) // 2]


def measure_noise(
    neighbours: Neighbours,
    step: float,
    roundoff: float,
    value_roundoff: float | None = None,
    relative_spacing: float = RELATIVE_SPACING,
) -> Noise:
    """Return the noise of a function of one variable around ``-step`` and ``+step``.

    Noise at 0 alone is too small at a converged optimum, where the loss itself, and its rounding, nearly vanish.

    Args:
        neighbours: gives the function's values at equally spaced points.
        step: the probe's step h.
        roundoff: unit roundoff u of the arithmetic.
        value_roundoff: unit roundoff of the function's value, where it is another.
        relative_spacing: spacing of the values relative to the step.

    Returns:
        ``max(1.2 ECnoise over both places, u max|f|)``, and f at the two places.
    """
    tables = []
    for centre in (step, -step):
        spacing = max(relative_spacing * step, SPACING_ROUNDOFFS * roundoff)
        for _ in range(WIDENINGS):
            values = neighbours(centre, spacing, VALUES)
            if len(set(values)) > VALUES // 2 or len(set(values)) == 1:
                break
            spacing *= 10
        tables.append(values)
    largest = max(abs(value) for values in tables for value in values)
    sigma = max(ESTIMATE_CAUTION * difference_noise(*tables), (value_roundoff or roundoff) * largest)
    return Noise(sigma, {step: tables[0][0], -step: tables[1][0]})
