"""An `OptimizerRecipe` made live again: the same class, groups, options and state on the subject's parameters."""

from __future__ import annotations

import contextlib
import inspect
import warnings
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from audits.callables import import_object
from audits.errors import RecipeError
from audits.recipe import OptimizerRecipe, UnknownTensor
from audits.structures import map_tensors

#: Optimizers that the audit built, and those that they hold: a wrapper's base optimizer.
_OWN: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def optimizer_class(recipe: OptimizerRecipe) -> type[torch.optim.Optimizer]:
    """Return the optimizer's class.

    Raises:
        RecipeError: it cannot be imported, or is no optimizer.
    """
    found = recipe.live_class or import_object(recipe.class_path, role="optimizer class")
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise RecipeError(f"optimizer class {recipe.class_path!r} is no torch.optim.Optimizer")
    return found


def build_optimizer(
    recipe: OptimizerRecipe, parameters: Mapping[str, nn.Parameter], *, with_state: bool = True
) -> torch.optim.Optimizer:
    """Return a fresh optimizer on ``parameters``.

    A tensor the model does not have is stood in for by zeros of its shape: the optimizer holds it as it did, and no
    gradient ever reaches it. State goes where `placed_state` says.

    Raises:
        RecipeError: the class cannot be built from the recorded options.
    """
    cls = optimizer_class(recipe)
    groups = []
    for group in recipe.groups:
        tensors = [stand_in(p, parameters) if isinstance(p, UnknownTensor) else parameters[p] for p in group.parameters]
        groups.append({**dict(group.options), "params": tensors})
    accepted = inspect.signature(cls.__init__).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    arguments = {name: value for name, value in recipe.defaults.items() if open_ended or name in accepted}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of duplicates; registration.duplicate judges them
            optimizer = cls(groups, **arguments)
    except Exception as error:  # the class is the user's: whatever it raises is its answer
        raise RecipeError(
            f"optimizer {recipe.class_path} cannot be rebuilt from its recorded options: {error}"
        ) from error
    _OWN.update(_and_inside(optimizer))
    for built, group in zip(optimizer.param_groups, recipe.groups, strict=True):
        built.update(group.options)
    if with_state:
        for name, state in recipe.state.items():
            optimizer.state[parameters[name]] = placed_state(state, parameters[name], optimizer)
    return optimizer


def _and_inside(optimizer: torch.optim.Optimizer) -> Iterator[torch.optim.Optimizer]:
    yield optimizer
    for value in vars(optimizer).values():
        if isinstance(value, torch.optim.Optimizer):
            yield from _and_inside(value)


@contextlib.contextmanager
def others_refused(names: Mapping[int, str]) -> Iterator[None]:
    """Stop the step of any optimizer that moves the model and is not the audit's own, before it writes anything.

    A training script may have left hooks on the model that step its live optimizer in every backward.

    Args:
        names: ``id(parameter) -> name`` of the model's parameters.

    Raises:
        RecipeError: out of that optimizer's ``step``; the text names it and the cure.
    """

    def refuse(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        held = (names.get(id(p)) for group in optimizer.param_groups for p in group["params"])
        name = None if optimizer in _OWN else next((n for n in held if n is not None), None)
        if name is not None:
            raise RecipeError(
                f"the training step uses an optimizer of its own ({type(optimizer).__name__}, which holds {name!r}): "
                "use context.optimizers['PHASE'], 'step' for a single phase, also in hooks registered on the model"
            )

    handle = register_optimizer_step_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


def placed_state(state: Mapping[str, Any], parameter: torch.Tensor, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return a copy of a parameter's state on the devices where torch's ``load_state_dict`` puts it.

    That is the parameter's device, but for the ``step`` counter, which stays on the CPU unless the group's kernel
    counts on the device (``capturable``, ``fused``).
    """
    group = next((g for g in optimizer.param_groups if any(p is parameter for p in g["params"])), {})
    counts_there = bool(group.get("capturable") or group.get("fused"))

    def place(key: str, value: torch.Tensor) -> torch.Tensor:
        away = key == "step" and not counts_there
        return value.detach().to(value.device if away else parameter.device, copy=True)

    return {key: map_tensors(value, lambda t, key=key: place(key, t)) for key, value in state.items()}  # type: ignore[misc]


def stand_in(unknown: UnknownTensor, parameters: Mapping[str, nn.Parameter]) -> nn.Parameter:
    """Return zeros of the unknown tensor's shape and dtype."""
    device = next(iter(parameters.values())).device
    dtype = getattr(torch, unknown.dtype.removeprefix("torch."))
    return nn.Parameter(torch.zeros(unknown.shape, dtype=dtype, device=device))
