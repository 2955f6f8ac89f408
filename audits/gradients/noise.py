"""The noise of a computed function, measured: ECnoise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

#: Function values per estimate: m + 1 = 8, as the reference recommends (6 to 8).
VALUES = 8

#: Spacing of the values relative to the probe's step: far below it, far above the rounding of theta.
RELATIVE_SPACING = 1e-6

#: Second spacing, tried when an exceedance is not confirmed: rounding that changes slowly with theta (a bias whose
#: effect a BatchNorm takes out again) is the same at neighbouring points and shows only at this distance.
WIDE_SPACING = 1e-2

#: The spacing is at least so many roundoffs of theta, where the arithmetic is too coarse for the above (float32).
SPACING_ROUNDOFFS = 1e4

#: Widen the spacing tenfold while half of the values are equal, at most so often.
WIDENINGS = 4


def difference_noise(values: Sequence[float]) -> float:
    """Return the noise level of equally spaced function values.

    ``sigma_k^2 = gamma_k / (m + 1 - k) * sum_i (Delta^k f_i)^2`` with ``gamma_k = (k!)^2 / (2k)!``; the level is
    sigma_k of the first k whose successors agree within a factor of 4 and whose differences change sign, the median of
    the upper half of the table when none does.

    Args:
        values: m + 1 function values at equally spaced points.

    Returns:
        The standard deviation of the noise, 0 when all values are equal.

    Reference:
        J. J. More and S. M. Wild, Estimating computational noise, SIAM J. Sci. Comput. 33 (2011).
    """
    differences = list(values)
    count = len(values)
    levels: list[float] = []
    signs: list[bool] = []
    gamma = 1.0
    for k in range(1, count):
        differences = [b - a for a, b in itertools.pairwise(differences)]
        gamma *= 0.5 * k / (2 * k - 1)
        levels.append(math.sqrt(gamma * math.fsum(d * d for d in differences) / len(differences)))
        signs.append(min(differences) < 0 < max(differences))
    for k in range(len(levels) - 2):
        window = levels[k : k + 3]
        if signs[k] and max(window) <= 4 * min(window):
            return levels[k]
    upper = sorted(levels[len(levels) // 2 :])
    return upper[len(upper) // 2]


def measure_noise(
    function: Callable[[float], float],
    step: float,
    roundoff: float,
    value_roundoff: float | None = None,
    relative_spacing: float = RELATIVE_SPACING,
) -> float:
    """Return the noise of ``function`` around ``-step`` and ``+step``.

    Noise at 0 alone is too small at a converged optimum, where the loss itself, and its rounding, nearly vanish.

    Args:
        function: t -> f(theta + t v).
        step: the probe's step h.
        roundoff: unit roundoff u of the arithmetic.
        value_roundoff: unit roundoff of the function's value, where it is another.
        relative_spacing: spacing of the values relative to the step.

    Returns:
        ``max(ECnoise at -h, ECnoise at +h, u max|f|)``.
    """
    worst = 0.0
    for centre in (step, -step):
        spacing = max(relative_spacing * step, SPACING_ROUNDOFFS * roundoff)
        for _ in range(WIDENINGS):
            values = [function(centre + i * spacing) for i in range(VALUES)]
            if len(set(values)) > VALUES // 2 or len(set(values)) == 1:
                break
            spacing *= 10
        worst = max(worst, difference_noise(values), (value_roundoff or roundoff) * max(abs(v) for v in values))
    return worst
