"""Learning rates and schedules as the last steps really used them: schedules often end at 0, which shows nothing."""

from __future__ import annotations

import contextlib
import copy
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch

#: Steps that are remembered: from the first of them a schedule still has rates to show, at the end of training too.
REMEMBERED = 4


class LastRates:
    """Remembers every group's rate, and where the schedules stood, before each step."""

    def __init__(self) -> None:
        self._steps: deque[tuple[list[list[float]], list[Any]]] = deque(maxlen=REMEMBERED)

    def note(self, optimizers: Sequence[torch.optim.Optimizer], schedulers: Sequence[Any] = ()) -> None:
        """Remember rates and schedules as they are."""
        rates = [[float(group["lr"]) for group in optimizer.param_groups] for optimizer in optimizers]
        if self._steps and [len(each) for each in self._steps[-1][0]] != [len(each) for each in rates]:
            self._steps.clear()
        self._steps.append((rates, [copy.deepcopy(scheduler.state_dict()) for scheduler in schedulers]))

    @contextlib.contextmanager
    def put_back(self, optimizers: Sequence[torch.optim.Optimizer], schedulers: Sequence[Any] = ()) -> Iterator[None]:
        """Give optimizers and schedules for a while what they had at the first of the last steps with a rate."""
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        rates, states = self._chosen()
        before = [group["lr"] for group in groups]
        stood = [copy.deepcopy(scheduler.state_dict()) for scheduler in schedulers]
        try:
            if len(states) == len(schedulers):
                for scheduler, state in zip(schedulers, states, strict=True):
                    scheduler.load_state_dict(copy.deepcopy(state))
            if len(rates) == len(groups):
                for group, rate in zip(groups, rates, strict=True):
                    group["lr"] = rate
            yield
        finally:
            for scheduler, state in zip(schedulers, stood, strict=True):
                scheduler.load_state_dict(state)
            for group, rate in zip(groups, before, strict=True):
                group["lr"] = rate

    def _chosen(self) -> tuple[list[float], list[Any]]:
        if not self._steps:
            return [], []
        usable = (step for step in self._steps if all(any(rates) for rates in step[0]))
        rates, states = next(usable, self._steps[-1])
        return [rate for of_one in rates for rate in of_one], states
