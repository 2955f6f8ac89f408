"""An `OptimizerRecipe` made live again: the same object, as far as it is recorded, on the subject's parameters."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from audits.errors import RecipeError
from audits.random_state import random_state_kept
from audits.recipe.constructing import constructed, mould_of_recipe
from audits.recipe.copying import GONE, alike, attributes_of
from audits.recipe.lone_optimizers import OWN
from audits.recipe.moulds import STEP_HOOKS, TORCHS_OWN, cast_from, changed_by, emptied, mould_of
from audits.recipe.phases import OptimizerRecipe, UnknownTensor
from audits.structures import map_tensors

#: Entries of a group that optimizers write themselves, at every step: no options.
RUNNING = ("step", "k", "weight_sum", "lr_max", "scheduled_lr")


def build_optimizer(
    recipe: OptimizerRecipe,
    parameters: Mapping[str, nn.Parameter],
    *,
    with_state: bool = True,
    fresh: bool | None = None,
    hooks: bool = True,
    dtype: torch.dtype | None = None,
) -> torch.optim.Optimizer:
    """Return the recorded optimizer on ``parameters``: a copy of the live one, or as much of it as a recipe holds.

    A tensor the model does not have is stood in for by zeros of its shape: the optimizer holds it as it did, and no
    gradient ever reaches it. State goes where `placed_state` says.

    Args:
        recipe: the optimizer.
        parameters: by name.
        with_state: whether it starts from the recorded state.
        fresh: whether attributes that a step changes are as before the first one; by default without state.
        hooks: whether what was put around the class's ``step`` comes along: step hooks, a ``step`` of the instance.
        dtype: dtype of what it keeps outside of ``state``, where that is not its own.

    Raises:
        RecipeError: it cannot be built from what is recorded.
    """
    tensors: dict[str, torch.Tensor] = dict(parameters)
    for unknown in recipe.unknown:
        tensors[unknown.label] = stand_in(unknown, parameters)
    held = [[tensors[p if isinstance(p, str) else p.label] for p in group.parameters] for group in recipe.groups]
    mould = mould_of_recipe(recipe)
    fresh = not with_state if fresh is None else fresh
    if mould is None:
        optimizer = constructed(recipe, held)
    else:
        device = next(iter(parameters.values())).device
        place = functools.partial(_placed, device=device, dtype=dtype)
        optimizer = _cast(recipe, mould, tensors, held, place, fresh=fresh, hooks=hooks)
    OWN.update(_and_inside(optimizer))
    for built, recorded in zip(optimizer.param_groups, recipe.groups, strict=True):
        for key in RUNNING if mould is not None and fresh else ():  # as the constructor leaves them
            built.pop(key, None)
            built.update({key: recipe.defaults[key]} if key in recipe.defaults else {})
        built.update(recorded.options)
    if with_state:
        for name, state in recipe.state.items():
            optimizer.state[parameters[name]] = placed_state(state, parameters[name], optimizer)
    return optimizer


def _cast(
    recipe: OptimizerRecipe,
    mould: torch.optim.Optimizer,
    tensors: Mapping[str, torch.Tensor],
    held: Sequence[Sequence[torch.Tensor]],
    place: Callable[[torch.Tensor], torch.Tensor],
    *,
    fresh: bool,
    hooks: bool,
) -> torch.optim.Optimizer:
    """Return a copy of a mould that holds these tensors in the recorded groups."""
    assert recipe.kept is not None
    optimizer = cast_from(
        mould, tensors, place=place, hooks=hooks, own=hooks or recipe.kept.replaced, with_state=not fresh,
        instead=_first_values(recipe, mould) if fresh else {},
    )  # fmt: skip
    _set_up_inside(optimizer, recipe, held, fresh=fresh)
    optimizer.defaults = dict(recipe.defaults)
    if len(optimizer.param_groups) != len(held):
        optimizer.param_groups[:] = [{"params": []} for _ in held]
    for group, own in zip(optimizer.param_groups, held, strict=True):
        group["params"][:] = own
    _complete(optimizer, recipe, held)
    if fresh:
        _begin_state(optimizer, recipe, held)
    return optimizer


def _set_up_inside(
    optimizer: torch.optim.Optimizer, recipe: OptimizerRecipe, held: Sequence[Sequence[torch.Tensor]], *, fresh: bool
) -> None:
    """Bring the optimizers that an optimizer holds onto its parameters: they may file them in groups of their own."""
    inside = list(_and_inside(optimizer))[1:]
    for inner in inside if fresh else ():
        inner.state.clear()
    if any(group["params"] for inner in inside for group in inner.param_groups) or not inside:
        return
    with contextlib.suppress(RecipeError):  # on other parameters altogether: as the constructor makes them
        for name, value in attributes_of(constructed(recipe, held)):
            if isinstance(value, torch.optim.Optimizer):
                object.__setattr__(optimizer, name, value)


def _complete(
    optimizer: torch.optim.Optimizer, recipe: OptimizerRecipe, held: Sequence[Sequence[torch.Tensor]]
) -> None:
    """Fill in what a stored recipe goes without, as the constructor has it, so that the rest can be looked at."""
    assert recipe.kept is not None
    if recipe.kept.live or not recipe.kept.missing:
        return
    try:
        other = constructed(recipe, held)
    except RecipeError:
        return
    for name, value in attributes_of(other):
        if not hasattr(optimizer, name):
            object.__setattr__(optimizer, name, value)


def _begin_state(
    optimizer: torch.optim.Optimizer, recipe: OptimizerRecipe, held: Sequence[Sequence[torch.Tensor]]
) -> None:
    """Fill in the state that a constructor makes before the first step: the sums of Adagrad and of its subclasses."""
    assert recipe.kept is not None
    if recipe.kept.begun is False:
        return
    with random_state_kept(), contextlib.suppress(RecipeError):
        begun = {k: v for k, v in constructed(recipe, held).state.items() if isinstance(k, torch.Tensor) and v}
        recipe.kept.begun = bool(begun)
        for tensor, state in begun.items():
            optimizer.state.setdefault(tensor, state)


def _placed(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
    """A copy beside the parameters; a counter stays where it is."""
    wanted = dtype if dtype is not None and tensor.is_floating_point() and tensor.dim() else tensor.dtype
    made = tensor.detach().to(device if tensor.dim() else tensor.device, wanted, copy=True)
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def keeps_state_aside(recipe: OptimizerRecipe) -> bool:
    """Whether an optimizer that has stepped keeps what its rule goes on from outside of ``state``: moments, a count.

    No rule can start there; both are then begun anew. Torch's own classes and most others count or remember per
    parameter in ``state``, and a counter beside that is no part of the rule.
    """
    mould = mould_of_recipe(recipe)
    if mould is None:
        return False
    first = _first_values(recipe, mould)
    if not any(value is GONE or not alike(value, getattr(mould, name, GONE)) for name, value in first.items()):
        return False
    return not recipe.state or not all({"step", "momentum_buffer"} & state.keys() for state in recipe.state.values())


def _first_values(recipe: OptimizerRecipe, mould: torch.optim.Optimizer) -> dict[str, Any]:
    """Return what the attributes that a step changes (a counter, a list of moments) hold before the first one.

    A step on two small tensors shows which they are; what a constructor makes of them is what they begin with.
    """
    assert recipe.kept is not None
    if recipe.kept.fresh is None:
        recipe.kept.fresh = {}
        with random_state_kept(), warnings.catch_warnings(), contextlib.suppress(Exception):
            warnings.simplefilter("ignore")
            recipe.kept.fresh = _found_fresh(recipe, mould)
    return recipe.kept.fresh


def _found_fresh(recipe: OptimizerRecipe, mould: torch.optim.Optimizer) -> dict[str, Any]:
    small = [nn.Parameter(torch.linspace(-1.0, 1.0, 6).view(2, 3)) for _ in recipe.groups]
    for parameter in small:
        parameter.grad = torch.full_like(parameter, 0.1)
    labels = {id(parameter): f"small.{i}" for i, parameter in enumerate(small)}
    private = {name for name, _ in attributes_of(mould)} - set(TORCHS_OWN)

    def twin(*, complete: bool) -> torch.optim.Optimizer:
        made = constructed(recipe, [[parameter] for parameter in small])
        for name, value in attributes_of(mould):
            if complete and name in private and not hasattr(made, name):
                object.__setattr__(made, name, value)
        return made

    def watched(made: torch.optim.Optimizer) -> dict[str, Any]:
        before = mould_of(made, labels)
        for place in STEP_HOOKS.values():
            getattr(made, place).clear()
        changed = changed_by(made, lambda: type(made).step(made))
        appeared = {n for n, _ in attributes_of(made)} - {n for n, _ in attributes_of(before)}
        values = {name: getattr(before, name) for name in changed if name in private}
        inside = [name for name, value in values.items() if isinstance(value, torch.optim.Optimizer)]
        return {**dict.fromkeys(appeared & private, GONE), **{n: v for n, v in values.items() if n not in inside}}

    try:
        constructed(recipe, [[parameter] for parameter in small])
    except RecipeError:
        copy = cast_from(mould, {}, place=torch.clone, hooks=False, own=False, with_state=False)
        copy.param_groups[:] = [{**g.options, "params": [p]} for g, p in zip(recipe.groups, small, strict=True)]
        return {name: emptied(value) for name, value in watched(copy).items()}
    try:
        return watched(twin(complete=False))
    except Exception:  # an attribute set by hand, without which its step cannot do
        return watched(twin(complete=True))


def _and_inside(optimizer: torch.optim.Optimizer) -> Iterator[torch.optim.Optimizer]:
    yield optimizer
    for value in vars(optimizer).values():
        if isinstance(value, torch.optim.Optimizer):
            yield from _and_inside(value)


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
