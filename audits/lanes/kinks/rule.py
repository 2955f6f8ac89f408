"""The branches operators take on floating values, and how each is evaluated again on the branch it took at theta.

A `Rule` has two halves. ``decide`` reads the decision off a call at theta; ``replay`` evaluates the operator at
another point *on that branch*. The replay's derivative at theta is torch's own convention there, ties included: ``abs``
has slope 0 at 0, ``clamp`` 1 at its bounds, ``relu6`` 0, ``maximum`` splits evenly, ``max(dim)`` takes the index it
returned. Operators whose whole result is an integer or a bool need no rule: their result at theta is handed out again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Bound = dict[str, Any]

#: In-place comparisons leave a mask in a floating tensor.
COMPARISONS = frozenset(
    {"eq", "ne", "lt", "le", "gt", "ge", "greater", "greater_equal", "less", "less_equal", "not_equal", "logical_not",
     "logical_and", "logical_or", "logical_xor", "isnan"}
)  # fmt: skip


def _self_is_real(bound: Bound) -> bool:
    for name in ("self", "input", "x1", "weight", "grad_output"):
        if isinstance(bound.get(name), torch.Tensor):
            return bool(bound[name].is_floating_point())
    return False


@dataclass(frozen=True)
class Rule:
    """One operator's decision and its evaluation on a given decision.

    Attributes:
        decide: ``(arguments, result) -> decision``, run at theta.
        replay: ``(decision, arguments) -> result``, run anywhere.
        applies: ``(arguments) -> bool``; a rule is for floating inputs and some options only.
        tie: torch's convention at the tie, for the table in the docs.
        convention: ``(arguments, decision) -> (the tensor concerned, what torch does instead of the derivative)``,
            where torch documents such a thing; the tensor is None where it is everything upstream of the operator.
    """

    decide: Callable[[Bound, Any], Any]
    replay: Callable[[Any, Bound], Any]
    applies: Callable[[Bound], bool] = _self_is_real
    tie: str = ""
    convention: Callable[[Bound, Any], tuple[torch.Tensor | None, str] | None] | None = None


_RULES: dict[str, Rule] = {}


def register(*names: str, rule: Rule) -> None:
    """Add a rule for operators, by their functional name."""
    for name in names:
        assert name not in _RULES, name
        _RULES[name] = rule


def registered() -> dict[str, Rule]:
    """Return the rules by operator name, as far as their modules are imported (`kinks.branches` imports them all)."""
    return _RULES
