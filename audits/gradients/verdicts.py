"""What was found out about one tensor, before it becomes a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from audits.causes import Cause
from audits.outcomes import Outcome, finite


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One tensor's result.

    Attributes:
        measured: what autograd says.
        expected: what the finite difference says.
        error: the residual.
        threshold: its bound.
        limit: smallest relative error of the gradient that would have been found; None where there is no scale.
        absolute_limit: smallest absolute error per element that would have been found, for zero gradients.
        displaced: whether it was judged at the displaced point.
        joint: whether the numbers belong to a direction through several tensors.
    """

    outcome: Outcome
    measured: float | None = None
    expected: float | None = None
    error: float | None = None
    threshold: float | None = None
    limit: float | None = None
    absolute_limit: float | None = None
    displaced: bool = False
    joint: bool = False
    cause: str | None = None
    message: str = ""
    where_to_look: str | None = None

    @property
    def numbers(self) -> dict[str, Any]:
        """The numbers of a row; what is not finite is left out."""
        return {
            "measured": finite(self.measured),
            "expected": finite(self.expected),
            "error": finite(self.error),
            "threshold": finite(self.threshold),
            "detection_limit": finite(self.limit),
        }


def describe(name: str, verdict: Verdict) -> str:
    """Say in a sentence what was found, for verdicts that bring no message of their own."""
    along = "a random direction through all tensors" if verdict.joint else "a random direction"
    where = f" at a displaced point, along {along}" if verdict.displaced else f" along {along}"
    if verdict.outcome is Outcome.FAIL and verdict.measured is not None and verdict.expected is not None:
        text = f"the gradient of {name!r} is wrong: autograd gives {verdict.measured:.6g}{where}"
        return f"{text}, the loss's derivative is {verdict.expected:.6g} (bound {verdict.threshold:.2g})"
    if verdict.outcome is Outcome.PASS:
        limit = f"; an error of {verdict.limit:.1e} relative would have shown" if verdict.limit is not None else ""
        return f"the gradient of {name!r} is the loss's derivative{where}{limit}"
    if verdict.cause == Cause.NONDETERMINISTIC:
        return f"cannot judge {name!r}: the loss differs between two evaluations at the same parameters"
    if verdict.limit is not None:
        return f"the gradient of {name!r} is too small to resolve: an error below {verdict.limit:.1e} would not show"
    return f"cannot judge {name!r}: {verdict.cause}"


def number(value: float | None) -> str:
    """Return a value as messages show it."""
    return "nothing" if value is None else f"{value:.6g}"
