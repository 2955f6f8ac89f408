"""The parts of a recipe as plain data: phases, optimizers with their groups, schedules, parameters by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch

from audits.recipe.callables import CallableReference
from audits.recipe.moulds import Kept


@dataclass(frozen=True)
class Phase:
    """One backward and one optimizer step inside a training step, given as live objects.

    Args:
        name: how rows name it; a single phase is named ``"step"``.
        loss: ``(model, batch) -> scalar``, its import path, a name of `torch.nn.functional`, a loss module, or
            ``"model"``.
        optimizer: the live `torch.optim.Optimizer`; its tensors are matched to the model's by identity.
        clip_grad_norm: the norm that gradients are clipped to, if they are.
        accumulate: micro-batches per step.
        scheduler: the live learning-rate scheduler, if there is one.
    """

    name: str
    _: KW_ONLY
    loss: Any
    optimizer: torch.optim.Optimizer
    clip_grad_norm: float | None = None
    accumulate: int = 1
    scheduler: Any = None


@dataclass(frozen=True)
class UnknownTensor:
    """A tensor that the optimizer holds and the model does not have.

    ``likely`` is the model's parameter that it probably was: same shape, and no optimizer holds that parameter.
    ``path`` is where the model or a loss keeps it unregistered (`audits.leaves`), if one does.
    """

    position: int
    shape: tuple[int, ...]
    dtype: str
    likely: str | None = None
    path: str | None = None

    @property
    def label(self) -> str:
        """How rows name it."""
        return f"<stale tensor #{self.position}>"


@dataclass(frozen=True)
class ParameterGroup:
    """One param group: its options and its tensors, by name where the model has them."""

    options: Mapping[str, Any]
    parameters: tuple[str | UnknownTensor, ...]


@dataclass(frozen=True)
class OptimizerRecipe:
    """An optimizer as data: class path, constructor defaults, groups, and state by parameter name.

    ``kept`` is what it holds beyond these (attributes, hooks, a ``step`` of its own), None where that is nothing. In
    the process that captured it also the class itself, and what puts the wrapper back that it was given in.
    """

    class_path: str
    defaults: Mapping[str, Any]
    groups: tuple[ParameterGroup, ...]
    state: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, compare=False, repr=False)
    kept: Kept | None = field(default=None, compare=False, repr=False)
    live_class: type[torch.optim.Optimizer] | None = field(default=None, compare=False, repr=False)
    rewrap: Callable[[torch.optim.Optimizer], Any] | None = field(default=None, compare=False, repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the model's parameters it holds, in order, repeated ones repeated."""
        return tuple(p for group in self.groups for p in group.parameters if isinstance(p, str))

    @property
    def unknown(self) -> tuple[UnknownTensor, ...]:
        """Tensors it holds that the model does not have."""
        return tuple(p for group in self.groups for p in group.parameters if isinstance(p, UnknownTensor))


@dataclass(frozen=True)
class SchedulerRecipe:
    """A learning-rate schedule as data: the rates of every group over the next steps, simulated at capture.

    ``learning_rates[k][g]`` is group g's rate during the k-th step from now.
    """

    class_path: str
    learning_rates: tuple[tuple[float, ...], ...]
    rewrap: Callable[..., Any] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class PhaseRecipe:
    """A phase as data."""

    name: str
    loss: CallableReference
    optimizer: OptimizerRecipe
    clip_grad_norm: float | None = None
    accumulate: int = 1
    scheduler: SchedulerRecipe | None = None


@dataclass(frozen=True)
class ParameterRecord:
    """A parameter of the model as it was at capture."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    trainable: bool
