"""What was found out about one tensor, before it becomes a row."""

from __future__ import annotations

from dataclasses import dataclass

from audits.outcomes import Outcome


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
