"""Logarithmic axes: decades, their labels, and where a value lies on them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

#: Decades whose powers are numbers of full precision.
LOWEST, HIGHEST = -307, 308


@dataclass(frozen=True)
class LogScale:
    """Decades ``10^low`` to ``10^high``; zero has a rail of its own below the lowest decade.

    Attributes:
        low: exponent of the lowest decade.
        high: exponent of the highest decade.
        has_zero: whether a value is exactly zero.
    """

    low: int
    high: int
    has_zero: bool

    @classmethod
    def of(cls, values: Iterable[float | None]) -> LogScale | None:
        """Return the scale that holds all finite values; None when there is none to show."""
        finite = [abs(value) for value in values if value is not None and math.isfinite(value)]
        positive = [math.log10(value) for value in finite if value > 0]
        if not finite:
            return None
        has_zero = len(positive) < len(finite)
        if not positive:
            return cls(-1, 0, has_zero)
        low, high = max(math.floor(min(positive)), LOWEST), min(math.ceil(max(positive)), HIGHEST)
        low = min(low, HIGHEST - 1)
        return cls(low, max(high, low + 1), has_zero)

    def share(self, value: float) -> float:
        """Return where the value lies, 0 at the bottom and 1 at the top; zero lies at the bottom."""
        bottom = self.low - self._rail
        if value == 0:
            return 0.0
        exponent = min(max(math.log10(abs(value)), self.low), self.high)
        return (exponent - bottom) / (self.high - bottom)

    @property
    def _rail(self) -> float:
        """Height of the rail for zero, in decades."""
        return 0.12 * (self.high - self.low) if self.has_zero else 0.0

    def ticks(self, most: int = 5) -> list[tuple[float, str]]:
        """Return at most ``most`` decades, and zero where it occurs, as (share, label)."""
        stride = max(1, math.ceil((self.high - self.low) / (most - 1)))
        decades = range(self.high, self.low - 1, -stride)
        ticks = [(self.share(10.0**exponent), decade(exponent)) for exponent in decades]
        return [*ticks, (0.0, "0")] if self.has_zero else ticks


def decade(exponent: int) -> str:
    """Return a power of ten as text.

    >>> decade(-3)
    '10⁻³'
    """
    return "1" if exponent == 0 else "10" + str(exponent).translate(_SUPERSCRIPT)
