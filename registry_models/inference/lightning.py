"""Lightning modules train themselves: ``training_step`` is the loss, ``configure_optimizers`` the optimizers.

In manual optimization (a GAN) the losses are those that ``training_step`` hands to ``manual_backward``; every
``optimizer.step()`` ends a phase.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from audits.errors import RecipeError
from audits.recipe.phases import Phase

#: What Lightning's own `Trainer` would tell a module that asks.
_TRAINER: dict[str, Any] = {
    "current_epoch": 0,
    "global_step": 0,
    "max_epochs": 1,
    "max_steps": 100,
    "num_training_batches": 100,
    "estimated_stepping_batches": 100,
    "accumulate_grad_batches": 1,
    "world_size": 1,
    "num_devices": 1,
    "global_rank": 0,
    "local_rank": 0,
    "is_global_zero": True,
    "is_last_batch": False,
    "training": True,
    "sanity_checking": False,
    "logger": None,
    "loggers": (),
    "datamodule": None,
    "callback_metrics": {},
}


def is_lightning(module: nn.Module) -> bool:
    """Whether the module is a LightningModule of either package."""
    return any(cls.__name__ == "LightningModule" for cls in type(module).__mro__)


@dataclass
class _Events:
    """What a training step did: losses it went backward from, and after which of them which optimizer stepped."""

    optimizers: int
    pending: list[torch.Tensor] = field(default_factory=list)
    steps: list[tuple[int, list[torch.Tensor]]] = field(default_factory=list)
    clipped: float | None = None
    clips: list[float | None] = field(default_factory=list)

    def stepped(self, index: int) -> None:
        self.steps.append((index, self.pending))
        self.clips.append(self.clipped)
        self.pending, self.clipped = [], None

    def clip(self, _: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None) -> None:
        if str(getattr(gradient_clip_algorithm, "value", gradient_clip_algorithm)) != "value" and gradient_clip_val:
            self.clipped = float(gradient_clip_val)


class TrainingStepLoss:
    """``(model, batch) -> scalar`` from a module's own ``training_step``.

    Args:
        optimizers: how many optimizers the module configures.
        position: which ``optimizer.step()`` of manual optimization ends this phase; None for automatic optimization.
    """

    def __init__(self, optimizers: int, position: int | None = None) -> None:
        self.optimizers = optimizers
        self.position = position
        self.__qualname__ = "training_step" if position is None else f"training_step (phase {position})"

    def __call__(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """Run the training step and return the loss; nothing is stepped."""
        events = _Events(self.optimizers)
        with _without_trainer(model, events):
            output = _call_step(model, batch["batch"])
        if self.position is None:
            loss = output.get("loss") if isinstance(output, Mapping) else output
            if not isinstance(loss, torch.Tensor):
                raise RecipeError(f"training_step returned {type(output).__name__}, no loss")
            return loss
        if self.position >= len(events.steps) or not events.steps[self.position][1]:
            raise RecipeError(
                "training_step optimizes by hand and calls no self.manual_backward(loss) before its optimizer.step(): "
                "attach a recipe with phases=[Phase(...), ...]"
            )
        return torch.stack(events.steps[self.position][1]).sum()


def configured_optimizers(module: Any) -> list[tuple[torch.optim.Optimizer, Any]]:
    """Return what ``configure_optimizers`` gives: pairs of optimizer and learning-rate scheduler (or None).

    Raises:
        RecipeError: it raises or gives none.
    """
    try:
        with _without_trainer(module, _Events(0)):
            found = module.configure_optimizers()
    except Exception as error:
        raise RecipeError(f"configure_optimizers raised {type(error).__name__}: {error}") from error
    schedulers: list[Any] = []
    if isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], (list, tuple)):
        found, schedulers = found
    entries = list(found) if isinstance(found, (list, tuple)) else [found]
    pairs = []
    for index, entry in enumerate(entries):
        scheduler = entry.get("lr_scheduler") if isinstance(entry, Mapping) else None
        if scheduler is None and index < len(schedulers):
            scheduler = schedulers[index]
        if isinstance(scheduler, Mapping):
            scheduler = scheduler.get("scheduler")
        optimizer = entry.get("optimizer") if isinstance(entry, Mapping) else entry
        if isinstance(optimizer, torch.optim.Optimizer):
            pairs.append((optimizer, scheduler))
    if not pairs:
        raise RecipeError("configure_optimizers gives no torch.optim.Optimizer")
    return pairs


def lightning_phases(
    module: Any, batch: Any, live: list[tuple[torch.optim.Optimizer, Any]] | None = None
) -> list[Phase]:
    """Return the training step's phases; running it once on ``batch`` shows which optimizers it steps.

    Args:
        module: the LightningModule.
        batch: what ``training_step`` gets.
        live: the optimizers (and schedulers) that train it; what ``configure_optimizers`` gives otherwise.

    Raises:
        RecipeError: the training step cannot be run on this batch.
    """
    pairs = live or configured_optimizers(module)
    events = _Events(len(pairs))
    with _without_trainer(module, events):
        _call_step(module, batch)
    if getattr(module, "automatic_optimization", True):
        optimizer, scheduler = pairs[0]
        return [Phase("step", loss=TrainingStepLoss(len(pairs)), optimizer=optimizer, scheduler=scheduler)]
    phases: dict[int, Phase] = {}
    for position, (index, losses) in enumerate(events.steps):
        if losses and index not in phases:
            optimizer, scheduler = pairs[index]
            loss = TrainingStepLoss(len(pairs), position)
            phases[index] = Phase(
                f"optimizer-{index}", loss=loss, optimizer=optimizer, scheduler=scheduler,
                clip_grad_norm=events.clips[position],
            )  # fmt: skip
    if not phases:
        raise RecipeError(
            "training_step optimizes by hand and calls no self.manual_backward(loss): attach a recipe with phases=[...]"
        )
    return list(phases.values())


def steps_often(module: Any, batch: Any, optimizers: int) -> bool:
    """Whether the module steps an optimizer several times in one training step, each time for a loss of its own."""
    if getattr(module, "automatic_optimization", True):
        return False
    events = _Events(optimizers)
    with _without_trainer(module, events):
        _call_step(module, batch)
    stepped = [index for index, losses in events.steps if losses]
    return len(set(stepped)) < len(stepped)


def _call_step(module: Any, batch: Any) -> Any:
    parameters = inspect.signature(module.training_step).parameters
    extra = (0,) * (len([p for p in parameters.values() if p.default is p.empty]) - 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = module.training_step(batch, *extra)
    for warning in caught:
        if "target size" in str(warning.message):  # torch broadcasts a wrong target and only warns
            raise RecipeError(f"the batch does not fit training_step: {warning.message}")
    return output


@contextlib.contextmanager
def _without_trainer(module: Any, events: _Events) -> Iterator[None]:
    """Let a module run its step without Lightning's Trainer: logging goes nowhere, nothing is stepped."""
    optimizers = [_Optimizer(events, index) for index in range(events.optimizers)]
    handed: Any = optimizers[0] if len(optimizers) == 1 else optimizers
    replaced: dict[str, Callable[..., Any]] = {
        "log": lambda *a, **k: None,
        "log_dict": lambda *a, **k: None,
        "optimizers": lambda *a, **k: handed,
        "lr_schedulers": lambda *a, **k: None,
        "manual_backward": lambda loss, *a, **k: events.pending.append(loss),
        "toggle_optimizer": lambda *a, **k: None,
        "untoggle_optimizer": lambda *a, **k: None,
        "toggled_optimizer": lambda *a, **k: contextlib.nullcontext(),
        "clip_gradients": events.clip,
    }
    names = [name for name in replaced if name not in module.__dict__]
    for name in names:
        module.__dict__[name] = replaced[name]
    before = module.__dict__.get("_trainer")
    module.__dict__["_trainer"] = SimpleNamespace(**_TRAINER)
    try:
        yield
    finally:
        module.__dict__["_trainer"] = before
        for name in names:
            module.__dict__.pop(name, None)


class _Optimizer:
    """Stands in for an optimizer inside a training step."""

    def __init__(self, events: _Events, index: int) -> None:
        self._events = events
        self._index = index
        self.param_groups: list[dict[str, Any]] = []

    def step(self, closure: Callable[[], Any] | None = None, **_: Any) -> None:
        """End a phase."""
        if closure is not None:
            closure()
        self._events.stepped(self._index)

    def zero_grad(self, *_: Any, **__: Any) -> None:
        """Do nothing."""

    def toggle_model(self, *_: Any, **__: Any) -> contextlib.AbstractContextManager[None]:
        """Do nothing."""
        return contextlib.nullcontext()
