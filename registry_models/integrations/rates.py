"""Learning rates as the last step really used them: schedules often end at 0, where no update could be judged."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch


class LastRates:
    """Remembers every group's rate before each step."""

    def __init__(self) -> None:
        self._rates: list[list[float]] = []

    def note(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Remember the rates as they are, unless all of one optimizer's are 0."""
        rates = [[float(group["lr"]) for group in optimizer.param_groups] for optimizer in optimizers]
        if len(rates) != len(self._rates):
            self._rates = rates
            return
        self._rates = [new if any(new) else old for new, old in zip(rates, self._rates, strict=True)]

    @contextlib.contextmanager
    def put_back(self, optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[None]:
        """Give the optimizers these rates for a while."""
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        rates = [rate for of_one in self._rates for rate in of_one]
        before = [group["lr"] for group in groups]
        try:
            if len(rates) == len(groups):
                for group, rate in zip(groups, rates, strict=True):
                    group["lr"] = rate
            yield
        finally:
            for group, rate in zip(groups, before, strict=True):
                group["lr"] = rate
