"""The very optimizer build on copies of the weights in another dtype, fed the gradients that were received."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from audits.recipe.constructing import optimizer_class
from audits.recipe.optimizers import build_optimizer, placed_state
from audits.recipe.phases import OptimizerRecipe, ParameterGroup
from audits.structures import map_tensors
from audits.updates.compare import real_dtype, to_double
from audits.updates.judge.masters import masters_of
from audits.updates.record.calls import Call
from audits.updates.record.modes import options_of_train_mode

#: State entries of torch.optim that count or multiply up over steps, whatever the parameter's shape.
_COUNTERS = ("step", "mu_product", "eta", "mu")

#: Elements judged at a time: about 64 bytes each are held in float64.
PART = 2**25

#: Complex counterpart of a real dtype.
_COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}


class Replay:
    """One phase's optimizer in a lane.

    The update of a rule is too small for the weights' own dtype to show in full (decay of 1e-5 in float32, anything in
    bfloat16); the same build on float64 copies shows it to 13 digits.

    Args:
        recipe: the optimizer.
        weights: names and values to start from.
        dtype: the lane's real dtype; None keeps each tensor's own.
        state: state to start from, by name; {} for fresh.
        overrides: options that replace the recorded ones in every group (``{"foreach": False}``).
    """

    def __init__(
        self,
        recipe: OptimizerRecipe,
        weights: Mapping[str, torch.Tensor],
        dtype: torch.dtype | None,
        state: Mapping[str, Mapping[str, Any]],
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        self.dtype = dtype
        self.native = {name: value.dtype for name, value in weights.items()}
        self.copies = {name: nn.Parameter(self._cast(value).clone()) for name, value in weights.items()}
        built = build_optimizer(recipe, self.copies, with_state=False, fresh=not state, hooks=False, dtype=dtype)
        self.optimizer = built
        self._overrides = {**options_of_train_mode(built), **(overrides or {})}
        self._masters = masters_of(recipe)
        for group in self.optimizer.param_groups:
            group.update(self._overrides)
        self._made = _dtypes_made(recipe, dtype) if dtype is not None and any(n in self.copies for n in state) else {}
        for name, values in state.items():
            if name in self.copies:
                copy = self.copies[name]
                self.optimizer.state[copy] = self._cast_state(placed_state(values, copy, self.optimizer))

    def step(
        self,
        weights: Mapping[str, torch.Tensor],
        gradients: Mapping[str, torch.Tensor | None],
        options: Mapping[str, Mapping[str, Any]],
    ) -> dict[str, torch.Tensor]:
        """Take one step from ``weights`` and return each parameter's update in float64."""
        before = {}
        for name, copy in self.copies.items():
            copy.data.copy_(weights[name])
            held = self.optimizer.state.get(copy, {})
            for key in self._masters:
                if key in held:
                    held[key].copy_(weights[name])
            gradient = gradients.get(name)
            # A copy: SGD(foreach, nesterov), a GPU's default, writes into the gradient it is given.
            copy.grad = None if gradient is None else self._cast(gradient).clone()
            before[name] = to_double(copy)
        names = {id(copy): name for name, copy in self.copies.items()}
        for group in self.optimizer.param_groups:
            if not options:
                break
            first = next((names[id(p)] for p in group["params"] if id(p) in names), None)
            if first is not None and first in options:
                group.update({**self._lane_options(options[first], first), **self._overrides})
        with torch.enable_grad():
            self.optimizer.step()
        return {name: to_double(copy).sub_(before[name]) for name, copy in self.copies.items()}

    def _lane_options(self, options: Mapping[str, Any], name: str) -> dict[str, Any]:
        chosen = dict(options)
        eps = chosen.get("eps")
        if isinstance(eps, tuple) and eps[0] is None:  # Adafactor's default follows the weights' dtype
            chosen["eps"] = (torch.finfo(real_dtype(self.native[name])).eps, eps[1])
        return chosen

    def _cast(self, value: torch.Tensor) -> torch.Tensor:
        if self.dtype is None:
            return value.detach()
        dtype = _COMPLEX[self.dtype] if value.dtype.is_complex else self.dtype
        return value.detach().to(dtype)

    def _cast_state(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Moments follow the lane's dtype; counters stay as they are.

        Counters are 0-dim float32 in torch, and so are the moments of a 0-dim parameter and norms that others keep: the
        name decides.
        """

        def cast(value: torch.Tensor, key: str) -> torch.Tensor:
            counter = value.dim() == 0 and key in _COUNTERS
            if counter or not (value.is_floating_point() or value.is_complex()):
                return value
            return value.detach().to(self._made[key]) if key in self._made else self._cast(value)

        return {key: map_tensors(value, lambda t, key=key: cast(t, key)) for key, value in values.items()}  # type: ignore[misc]


def _dtypes_made(recipe: OptimizerRecipe, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the dtypes that an optimizer which is not torch's own keeps its state in on weights of a dtype.

    Some of it may follow the weights and some be in bfloat16 whatever they are.
    """
    if getattr(torch.optim, optimizer_class(recipe).__name__, None) is optimizer_class(recipe):
        return {}
    small = {"matrix": torch.ones(3, 2, dtype=dtype), "vector": torch.ones(2, dtype=dtype)}
    groups = (ParameterGroup(recipe.groups[0].options, tuple(small)),)
    found: dict[str, torch.dtype] = {}
    with contextlib.suppress(Exception):  # what cannot step on these keeps what is not known
        replay = Replay(dataclasses.replace(recipe, groups=groups, state={}), small, dtype, {})
        replay.step(small, small, {})
        for name in small:
            for key, value in replay.optimizer.state[replay.copies[name]].items():
                if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel() > 1:
                    found[key] = value.dtype
    return found


def parts_of(names: Sequence[str], sizes: Mapping[str, int], size: int | None = None) -> list[tuple[str, ...]]:
    """Cut parameters, in order, into parts that are judged one after the other, so that wide copies fit memory.

    Args:
        names: the parameters.
        sizes: their numbers of elements.
        size: elements of a part, unless a single parameter has more; `PART` if not given.
    """
    size = PART if size is None else min(size, PART)
    parts: list[list[str]] = [[]]
    room = size
    for name in names:
        if parts[-1] and sizes[name] > room:
            parts.append([])
            room = size
        parts[-1].append(name)
        room -= sizes[name]
    return [tuple(part) for part in parts if part]


def restricted(recipe: OptimizerRecipe, names: Collection[str]) -> OptimizerRecipe:
    """Return the optimizer on some of its parameters: a rule of `RULES` treats tensors one by one."""
    groups = ((g.options, tuple(p for p in g.parameters if p in names)) for g in recipe.groups)
    return dataclasses.replace(recipe, groups=tuple(ParameterGroup(o, held) for o, held in groups if held))


class LaneCache:
    """Replays of one phase's calls so far, a lane each, for one part of the parameters at a time.

    Args:
        recipe: the optimizer.
        state: state to start from, by name; {} for fresh.

    Attributes:
        history: the calls, the judged one last.
        part: names of the parameters replayed.
        captured: the state to start from.
    """

    def __init__(self, recipe: OptimizerRecipe, state: Mapping[str, Mapping[str, Any]]) -> None:
        self.history: list[Call] = []
        self.part: tuple[str, ...] = ()
        self._recipe, self.captured = recipe, state
        self._lanes: dict[torch.dtype, tuple[Replay, int, dict[str, torch.Tensor]]] = {}

    def turn_to(self, part: tuple[str, ...]) -> None:
        """Replay these parameters from now on; the copies of others are let go."""
        if self.part != part:
            self.part, self._lanes = part, {}

    def fresh(self, dtype: torch.dtype) -> Replay:
        """Return a replay that has taken no step yet."""
        weights = {name: self.history[0].before[name] for name in self.part}
        return Replay(restricted(self._recipe, self.part), weights, dtype, self.captured)

    def updates(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return the last call's updates in a lane, having replayed the earlier calls there first."""
        replay, done, updates = self._lanes.get(dtype) or (self.fresh(dtype), 0, {})
        for call in self.history[done:]:
            updates = replay.step(call.before, call.gradients, call.options)
        self._lanes[dtype] = (replay, len(self.history), updates)
        return updates
