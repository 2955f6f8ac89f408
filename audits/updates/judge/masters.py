"""Float32 master copies that an optimizer keeps of bfloat16 weights: the rule moves them, the weights are rounded."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from audits.random_state import random_state_kept
from audits.recipe.moulds import Kept
from audits.recipe.optimizers import build_optimizer
from audits.recipe.phases import OptimizerRecipe, ParameterGroup
from audits.updates.record.calls import Call
from audits.updates.record.modes import in_train_mode

_KNOWN: weakref.WeakKeyDictionary[Kept, tuple[str, ...]] = weakref.WeakKeyDictionary()


def masters_of(recipe: OptimizerRecipe) -> tuple[str, ...]:
    """Return the names in an optimizer's state of the copies it keeps of bfloat16 weights; torch's classes keep none.

    The build takes a step on a small matrix and a vector in bfloat16. What is finer than the weights, of their
    shape, not equal to them, and equal once rounded, is their master copy.
    """
    if recipe.kept is None:
        return ()
    if recipe.kept not in _KNOWN:
        _KNOWN[recipe.kept] = ()
        with contextlib.suppress(Exception):  # what cannot step on these keeps none that could be known
            _KNOWN[recipe.kept] = _found(recipe)
    return _KNOWN[recipe.kept]


def _found(recipe: OptimizerRecipe) -> tuple[str, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (4, 3), "vector": (5,)}
    parameters = {n: nn.Parameter(torch.randn(s, generator=generator).bfloat16()) for n, s in shapes.items()}
    groups = (ParameterGroup(recipe.groups[0].options, tuple(shapes)),)
    with random_state_kept(), warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        small = dataclasses.replace(recipe, groups=groups, state={})
        optimizer = in_train_mode(build_optimizer(small, parameters, with_state=False, hooks=False))
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator).bfloat16()
        optimizer.step()
    kept: list[set[str]] = []
    for parameter in parameters.values():
        weights = parameter.detach()
        kept.append({
            key for key, value in optimizer.state[parameter].items()
            if isinstance(value, torch.Tensor) and value.shape == weights.shape and value.dtype is torch.float32
            and torch.equal(value.to(torch.bfloat16), weights) and not torch.equal(value, weights.float())
        })  # fmt: skip
    return tuple(sorted(set.intersection(*kept)))


def seen_by_masters(
    call: Call, masters: tuple[str, ...], before: Mapping[str, torch.Tensor]
) -> tuple[Call, dict[str, torch.Tensor], list[str]]:
    """Return a call in which master copies stand for the weights, the copies after it, and the weights that left them.

    Args:
        call: the recorded call.
        masters: names of the copies in the state.
        before: the copies before it, by parameter; the weights where there was none yet.
    """
    moved, start, end, left = {}, dict(call.before), dict(call.after), []
    for name in call.gradients:
        state: Mapping[str, Any] = call.state_after.get(name) or {}
        copy = next((state[key] for key in masters if key in state), None)
        weights = call.before[name]
        if copy is None or call.gradients[name] is None or copy.shape != weights.shape:
            continue
        if not torch.equal(copy.to(weights.dtype), call.moved(name).detach()):
            left.append(name)
        start[name] = before.get(name, weights).to(copy.dtype)
        end[name] = moved[name] = copy
    return dataclasses.replace(call, before=start, after=end), moved, left
