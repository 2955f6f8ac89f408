"""Under which names an optimizer that is not torch's keeps what its rule calls ``exp_avg`` or ``step``: measured."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping
from typing import Any

import torch

from audits.live.subject import LivePhase
from audits.recipe.optimizers import RUNNING
from audits.recipe.phases import ParameterGroup
from audits.updates.compare import rms, to_double
from audits.updates.judge.apply_rule import reference_state, reference_update, rule_options
from audits.updates.judge.own_attributes import shared_of
from audits.updates.judge.replay import Replay
from audits.updates.rules import Rule, State

#: Steps after which states are compared: a count of 3 is no flag, averages of three gradients are unlike each other.
STEPS = 3

#: Shapes of the tensors that are stepped.
SHAPES: tuple[tuple[int, ...], ...] = ((4, 3), (5,))

#: Relative distance of one quantity in two arithmetics, one of which may keep it in float32 (3 steps of 6e-8 each); two
#: quantities of random gradients are far further apart.
SAME = 1e-5

#: Stands for a count that the optimizer keeps in its group, where the options tell it.
IN_GROUP = "the group's own count"

#: Names in a group of what the rule counts.
_KEPT_AS = {"step": ("step", "k"), "weight_sum": ("weight_sum",)}


_KNOWN: weakref.WeakKeyDictionary[LivePhase, dict[str, Mapping[str, str | None]]] = weakref.WeakKeyDictionary()


def state_names(phase: LivePhase, rule: Rule) -> Mapping[str, str | None]:
    """Return, for each name in the rule's state, the optimizer's name of it; None where no entry is it.

    The build takes three steps beside the rule on a small matrix and a vector. An entry of the very name is it in any
    case; another is it when it holds the same numbers. What the optimizer counts in its group is left out: the options
    tell it.

    Args:
        phase: whose optimizer.
        rule: its rule.
    """
    known = _KNOWN.setdefault(phase, {})
    if rule.name not in known:
        known[rule.name] = _measured(phase, rule)
    return known[rule.name]


def _measured(phase: LivePhase, rule: Rule) -> Mapping[str, str | None]:
    found: dict[str, str | None] = {}
    for shape in SHAPES:  # Adafactor keeps other things of a vector than of a matrix
        try:
            found.update({k: v for k, v in _names_on(shape, phase, rule).items() if found.get(k) is None})
        except Exception:  # a build that cannot take this step says so where it is judged
            continue
    return found


def _names_on(shape: tuple[int, ...], phase: LivePhase, rule: Rule) -> dict[str, str | None]:
    generator = torch.Generator().manual_seed(0)
    group = phase.recipe.optimizer.groups[0]
    options = {key: value for key, value in group.options.items() if key not in RUNNING}
    recipe = dataclasses.replace(phase.recipe.optimizer, groups=(ParameterGroup(options, ("probe",)),), state={})
    state: State = {}
    actual: Mapping[str, Any] = {}
    held: Mapping[str, Any] = {}
    device = next(iter(phase.parameters.values())).device
    replay: Replay | None = None
    for _ in range(STEPS):
        theta, gradient = (torch.randn(shape, dtype=torch.float64, generator=generator).to(device) for _ in "td")
        replay = replay or Replay(recipe, {"probe": theta}, torch.float64, {})
        chosen = rule_options(phase, options, torch.float64)
        reference_update(rule, theta, gradient.to_sparse() if rule.sparse else gradient, state, chosen)
        replay.step({"probe": theta}, {"probe": gradient}, {"probe": options})
        held = replay.optimizer.param_groups[0]
        actual = {**shared_of(replay.optimizer), **replay.optimizer.state[replay.copies["probe"]]}
    told = {key for key in state if any(_same(held.get(name), state[key]) for name in _KEPT_AS.get(key, (key,)))}
    told |= {"lr_max"}  # where no group tells, the rate now in force
    names = {key: _name_of(key, value, actual, device) for key, value in state.items() if key not in told}
    chosen = rule_options(phase, options, torch.float64)
    kept = [k for k, name in names.items() if name is not None or _matters(k, rule, theta, gradient, state, chosen)]
    in_group = {"step": IN_GROUP} if "step" in told and "step" not in actual else {}
    return {**{k: names[k] for k in kept}, **in_group}


def _matters(
    key: str, rule: Rule, theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Mapping[str, Any]
) -> bool:
    """Whether the rule's next step is another one without an entry of its state: RMSprop only counts its steps."""
    gradient = gradient.to_sparse() if rule.sparse else gradient
    left = {k: v for k, v in state.items() if k != key}
    with_it, without = (reference_update(rule, theta, gradient, s, options) for s in (dict(state), left))
    return not torch.equal(with_it, without)


def _name_of(key: str, wanted: Any, actual: Mapping[str, Any], device: torch.device) -> str | None:
    if key in actual:
        return key
    found = reference_state(actual, device)
    return next((name for name, value in found.items() if _same(value, wanted)), None)


def _same(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, torch.Tensor):
        if not isinstance(value, torch.Tensor) or value.shape != wanted.shape or value.is_complex():
            return False
        return rms(to_double(value) - wanted) <= SAME * rms(wanted)
    single = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
    numbers = isinstance(single, (int, float)) and isinstance(wanted, (int, float)) and not isinstance(single, bool)
    return numbers and abs(single - wanted) <= SAME * abs(wanted)
