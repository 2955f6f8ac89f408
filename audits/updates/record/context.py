"""What a recipe's own step function is handed: optimizers, schedulers and the loss scaler, by phase."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from audits.errors import suggest
from audits.live.subject import Subject
from audits.updates.record.modes import in_train_mode

#: torch's own first loss scale; halved by the audit, sixteen at a time, while the gradients overflow.
INITIAL_SCALE = 2.0**16


class ReplayedSchedule:
    """A scheduler that plays back the rates recorded at capture.

    Args:
        optimizer: whose ``lr`` it sets.
        rates: per step from now, the rate of every group.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, rates: Sequence[Sequence[float]]) -> None:
        self.optimizer = optimizer
        self._rates = rates
        self._position = 0
        self._step_count = 0  # accelerate's wrapper counts it up
        self._apply()

    def step(self, *_: Any, **__: Any) -> None:
        """Go on to the next step's rates."""
        self._position = min(self._position + 1, len(self._rates) - 1)
        self._apply()

    def get_last_lr(self) -> list[float]:
        """Return the rate of every group now."""
        return [float(rate) for rate in self._rates[self._position]]

    def state_dict(self) -> dict[str, Any]:
        """Return the position, for step functions that log it."""
        return {"last_epoch": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position, for frameworks that restore schedulers."""
        self._position = min(int(state["last_epoch"]), len(self._rates) - 1)
        self._apply()

    def _apply(self) -> None:
        for group, rate in zip(self.optimizer.param_groups, self._rates[self._position], strict=False):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


#: What a context has; optimizers and schedulers by the name of the phase.
CONTEXT = ("optimizers", "schedulers", "scaler", "device", "optimizer", "scheduler")


class ByPhase(dict[str, Any]):
    """A mapping by the name of the phase that answers a name which is none with the nearest."""

    def __missing__(self, name: str) -> Any:
        """Refuse the name.

        Raises:
            KeyError: always.
        """
        raise KeyError(f"there is no phase {name!r} here{suggest(str(name), self) or '; ' + ', '.join(self)}")


@dataclass(frozen=True)
class StepContext:
    """What ``step(model, batch, context)`` works with.

    Attributes:
        optimizers: by phase name; a single phase is named ``"step"``.
        schedulers: by phase name; only phases that have one.
        scaler: a `torch.amp.GradScaler`, enabled under ``precision="fp16-autocast"``.
        optimizer: the first phase's optimizer, for a step with a single one.
    """

    optimizers: dict[str, torch.optim.Optimizer]
    schedulers: dict[str, ReplayedSchedule]
    scaler: torch.amp.GradScaler
    device: torch.device

    def __getattr__(self, name: str) -> Any:
        """Answer a guess, such as ``context.zero_grad``, with what a context has and where that is.

        Raises:
            AttributeError: always.
        """
        if name.startswith("__"):
            raise AttributeError(name)
        held: list[tuple[str, dict[str, Any]]] = [("optimizer", self.optimizers), ("scheduler", self.schedulers)]
        for one, by_phase in held:
            if any(hasattr(each, name) for each in by_phase.values()):
                phase = next(iter(by_phase))
                place = f"context.{one}" if len(by_phase) == 1 else f"context.{one}s[{phase!r}]"
                raise AttributeError(f"a step's context has no {name!r}; did you mean {place}.{name}?")
        raise AttributeError(f"a step's context has no {name!r}{suggest(name, CONTEXT)}; it has {', '.join(CONTEXT)}")

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The first phase's optimizer."""
        return next(iter(self.optimizers.values()))

    @property
    def scheduler(self) -> ReplayedSchedule | None:
        """The first phase's scheduler."""
        return next(iter(self.schedulers.values()), None)


def in_training_wrappers(subject: Subject, context: StepContext) -> StepContext:
    """Return the context as a step function is handed it: in the wrappers that the training script has around it."""
    optimizers, schedulers = ByPhase(context.optimizers), ByPhase(context.schedulers)
    for phase in subject.phases:
        optimizer, schedule = phase.recipe.optimizer, phase.recipe.scheduler
        if optimizer.rewrap is None:
            continue
        optimizers[phase.name] = optimizer.rewrap(optimizers[phase.name])
        if phase.name in schedulers and schedule is not None and schedule.rewrap is not None:
            schedulers[phase.name] = schedule.rewrap(schedulers[phase.name], optimizers[phase.name])
    return dataclasses.replace(context, optimizers=optimizers, schedulers=schedulers)


def build_context(subject: Subject, *, scale: float = INITIAL_SCALE) -> StepContext:
    """Return fresh optimizers, schedules and scaler for a run of training steps."""
    optimizers = {phase.name: phase.build_optimizer() for phase in subject.phases}
    if subject.recipe.step is None:  # a step of the user's own does it, or is wrong not to
        for optimizer in optimizers.values():
            in_train_mode(optimizer)
    schedulers = {}
    for phase in subject.phases:
        schedule = phase.recipe.scheduler
        if schedule is None or not schedule.learning_rates:
            continue
        schedulers[phase.name] = ReplayedSchedule(optimizers[phase.name], schedule.learning_rates)
    scaler = torch.amp.GradScaler(
        subject.device.type, init_scale=scale, enabled=subject.recipe.precision == "fp16-autocast"
    )
    return StepContext(optimizers, schedulers, scaler, subject.device)
