"""Every row of a batch draws the same random numbers: a loss that samples is then a function of its rows alone."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from audits.lanes.emulation import run
from audits.lanes.lifting import lift_call, lift_result, traits
from audits.lanes.tape import DRAWING, MIXING, draws


class AlikeRows(TorchDispatchMode):
    """Have every row of a batch draw the same random numbers, however many rows there are.

    The first row of each draw is remembered by its place in the forward and handed to every row of every batch, so that
    a loss that samples is a function of its rows alone. What draws no rows (a permutation) draws as ever.
    """

    def __init__(self, *, lift: bool) -> None:
        super().__init__()
        self._lift = lift
        self._first: list[torch.Tensor] = []
        self._place = 0

    def begin(self) -> None:
        """A forward begins: its first draw is the first that was remembered."""
        self._place = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._lift:
            args, kwargs, _ = lift_call(func, args, kwargs)
        result = self._drawn(func, args, kwargs) if draws(func, args, kwargs) else run(func, args, kwargs)
        return lift_result(func, result)[0] if self._lift else result

    def _drawn(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        base = traits(func).base
        if base == "native_dropout":
            result, mask = func(*args, **kwargs)
            alike = self._alike(mask)
            keep = 1.0 - float(args[1])
            return args[0] * alike.to(args[0].dtype) / keep if keep else result, alike
        result = func(*args, **kwargs)
        if base not in DRAWING or base in MIXING or base == "randperm" or not result.dim():
            return result
        alike = self._alike(result)
        return args[0].copy_(alike) if args and result is args[0] else alike

    def _alike(self, drawn: torch.Tensor) -> torch.Tensor:
        if not drawn.dim() or not drawn.shape[0]:
            return drawn
        place, self._place = self._place, self._place + 1
        if place == len(self._first):
            self._first.append(drawn[0].detach().clone())
        first = self._first[place]
        if first.shape != drawn.shape[1:]:
            first = drawn[0]
        return first.to(drawn.dtype).expand_as(drawn).clone()
