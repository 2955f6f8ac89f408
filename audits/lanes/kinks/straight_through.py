"""Straight-through estimates, recognised by their structure: a term and the negative of its stopped self in one sum.

``x + (q - x).detach()``, ``q - x.detach() + x``, ``exp(p - p.detach())``: the stop-gradient there has no other use than
to give the sum the value of one thing and the gradient of another. A value that is merely detached does not meet
itself with the other sign.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

#: Functions that add, and by which sign their second (`True`: first) argument counts.
_SUMS: dict[Any, tuple[float, float]] = {
    **dict.fromkeys((torch.add, torch.Tensor.add, torch.Tensor.add_, torch.Tensor.__add__, torch.Tensor.__radd__,
                     torch.Tensor.__iadd__), (1.0, 1.0)),
    **dict.fromkeys((torch.sub, torch.subtract, torch.Tensor.sub, torch.Tensor.subtract, torch.Tensor.sub_,
                     torch.Tensor.__sub__, torch.Tensor.__isub__), (1.0, -1.0)),
    **dict.fromkeys((torch.rsub, torch.Tensor.__rsub__), (-1.0, 1.0)),
}  # fmt: skip

_NEGATIONS = frozenset({torch.neg, torch.negative, torch.Tensor.neg, torch.Tensor.negative, torch.Tensor.__neg__})

#: (number of a tensor, number of the stop-gradient that holds it or None) -> its factor in a sum.
Terms = dict[tuple[int, int | None], float]


class SignedTerms:
    """Which tensors, stopped or not, a sum is made of, and with which sign."""

    def __init__(self, found: Callable[[int], None]) -> None:
        self._found = found
        self._terms: Any = WeakIdKeyDictionary()
        self._count = 0

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Follow a call; report every stop-gradient that meets what it stops with the other sign."""
        if not isinstance(result, torch.Tensor):
            return
        terms: Terms | None = None
        if func in _SUMS and len(args) >= 2:
            alpha = kwargs.get("alpha", 1)
            if isinstance(alpha, (int, float)):
                first, second = _SUMS[func]
                # rsub(x, y, alpha) is y - alpha x
                factors = (first * alpha, second) if first < 0 else (first, second * alpha)
                terms = self._sum(zip(args, factors, strict=False))
        elif func in _NEGATIONS:
            terms = self._sum([(args[0], -1.0)])
        if terms is not None:
            self._terms[result] = terms
            self._report(terms)
        elif args and result is args[0]:
            self._terms.pop(result, None)  # written in place: it is another value now

    def stop(self, source: Any, result: Any, site: int) -> None:
        """Note that ``result`` is ``source`` held constant by the stop-gradient of this number."""
        if not isinstance(source, torch.Tensor) or not isinstance(result, torch.Tensor):
            return
        stopped: Terms = {}
        for (number, by), factor in dict(self._of(source)).items():
            key = (number, site if by is None else by)
            stopped[key] = stopped.get(key, 0.0) + factor
        self._terms[result] = stopped

    def _sum(self, parts: Any) -> Terms:
        total: Terms = {}
        for value, sign in parts:
            for key, factor in self._of(value).items():
                total[key] = total.get(key, 0.0) + sign * factor
        return total

    def _of(self, value: Any) -> Terms:
        if not isinstance(value, torch.Tensor):
            return {}
        known: Terms | None = self._terms.get(value)
        if known is None:
            self._count += 1
            known = {(self._count, None): 1.0}
            self._terms[value] = known
        return known

    def _report(self, terms: Terms) -> None:
        for (number, by), factor in terms.items():
            if by is not None and factor and terms.get((number, None), 0.0) == -factor:
                self._found(by)
