"""How the implementation that a build runs works out its scalars, measured; and how far rounding them may carry."""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from audits.live.subject import LivePhase
from audits.recipe.phases import ParameterGroup
from audits.updates.compare import SLACK, WEIGHT_SLACK, rms
from audits.updates.judge.apply_rule import reference_state, reference_update
from audits.updates.judge.replay import Replay
from audits.updates.rules import Rule, State
from audits.updates.rules.base import SCALARS
from audits.updates.rules.scalars import EXACT, Scalars

if TYPE_CHECKING:
    from audits.updates.judge.expected import Expected

#: Unit roundoff of float32.
ROUNDOFF = 2.0**-24

#: Roundings of float32 scalars between a step and its update: a dozen operations, of which ``1 - mu`` (mu at most 0.9
#: in common use) makes nine out of one.
ROUNDINGS = 32.0

#: Steps of the measurement: powers are exact at the first.
STEPS = 3

#: Rules whose decay multiplies the weights by themselves.
DECOUPLED = ("AdamW", "Adafactor", "Muon")

#: A direction of which less is left beside the others is one of them: ten digits of it are known.
COLLINEAR = 1e-7

#: Options that choose an implementation with scalars of its own.
_CHOOSING = ("fused", "capturable", "differentiable")

_KNOWN: weakref.WeakKeyDictionary[LivePhase, dict[Any, Scalars]] = weakref.WeakKeyDictionary()


def with_scalar_options(
    phase: LivePhase, rule: Rule, options: Mapping[str, Any], state: State, dtype: torch.dtype
) -> dict[str, Any]:  # fmt: skip
    """Return a group's options with what the rule has to know of the implementation's scalars.

    Args:
        phase: whose optimizer.
        rule: its rule.
        options: the group's options, as `rule_options` gives them.
        state: the rule's state before the step.
        dtype: dtype of the weights in the lane.
    """
    chosen = dict(options)
    built = any(options.get(name) for name in _CHOOSING)
    if built and len(options.get("betas") or ()) == 2:
        scalars = scalars_of_build(phase, rule, options, dtype)
        chosen[SCALARS] = scalars
        chosen[SLACK] = scalar_slack(scalars, options, float(state.get("step", 0.0)) + 1.0)
    decoupled = rule.name in DECOUPLED or options.get("decoupled_weight_decay")
    if (isinstance(options.get("lr"), torch.Tensor) and decoupled) or (rule.name == "ASGD" and built):
        # ``1 - lr * weight_decay`` (ASGD: ``1 - lambd * eta``) is a float32 tensor there: a product and a difference
        # that multiply every weight.
        chosen[WEIGHT_SLACK] = ROUNDOFF
        chosen[SLACK] = max(chosen.get(SLACK, 0.0), ROUNDINGS * ROUNDOFF)
    return chosen


def scalar_slack(scalars: Scalars, options: Mapping[str, Any], t: float) -> float:
    """Return the relative error that rounding the scalars may make of step t's update.

    ``32 u``, and where a kernel takes its powers by itself, one unit in the last place of ``beta^t``:
    ``u (1 / (1 - b1^t) + 1 / (2 (1 - b2^t)))``. Where torch's own ``pow`` is called, the reference calls it too.
    """
    if not scalars.single:
        return 0.0
    powers = 0.0
    if scalars.moments is torch.float32:
        b1, b2 = (float(beta) for beta in options["betas"])
        powers = (1.0 / (1.0 - b1**t) if b1 < 1 else 0.0) + (0.5 / (1.0 - b2**t) if b2 < 1 else 0.0)
    return ROUNDOFF * (ROUNDINGS + powers)


def scalars_of_build(phase: LivePhase, rule: Rule, options: Mapping[str, Any], dtype: torch.dtype) -> Scalars:
    """Return the precision of a build's scalars: of the healthy ones, that which its first steps are nearest to.

    The build itself takes three steps from zero weights, where every digit of an update shows. That chooses between
    references, which differ by 1e-5; it never makes one: a kernel that follows none of them is near to none.

    Args:
        phase: whose optimizer.
        rule: its rule.
        options: the group's options.
        dtype: dtype of the weights; below float32 kernels compute in float32.
    """
    lane = torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32
    known = _KNOWN.setdefault(phase, {})
    key = (rule.name, lane, *(bool(options.get(name)) for name in _CHOOSING), tuple(map(float, options["betas"])))
    if key not in known:
        known[key] = _measured(phase, rule, options, lane)
    return known[key]


def _measured(phase: LivePhase, rule: Rule, options: Mapping[str, Any], lane: torch.dtype) -> Scalars:
    device = next(iter(phase.parameters.values())).device
    own = {name: value for name, value in options.items() if name != "dtype" and not name.startswith("audit.")}
    chosen = {**own, "lr": options["lr"] if float(options["lr"]) else 1e-3}
    recipe = dataclasses.replace(phase.recipe.optimizer, groups=(ParameterGroup(chosen, ("scalars",)),), state={})
    gradient = torch.tensor([1.0, -0.5, 0.25, 2.0], dtype=lane, device=device)
    weights = {"scalars": torch.zeros_like(gradient)}
    theta = torch.zeros(4, dtype=torch.float64, device=device)
    candidates = [EXACT] + [
        Scalars(moments, corrections, device)
        for moments, corrections in itertools.product((torch.float64, torch.float32), repeat=2)
        if torch.float32 in (moments, corrections)
    ]
    errors = [0.0] * len(candidates)
    states: list[State] = [{} for _ in candidates]
    try:
        replay = Replay(recipe, weights, lane, {})
        for _ in range(STEPS):
            update = replay.step(weights, {"scalars": gradient}, {"scalars": chosen})["scalars"]
            kept = reference_state(replay.optimizer.state[replay.copies["scalars"]], device)
            for i, scalars in enumerate(candidates):
                wanted = reference_update(rule, theta, gradient, states[i], {**chosen, SCALARS: scalars})
                pairs = [(update, wanted)] + [
                    (kept[k], v) for k, v in states[i].items() if isinstance(v, torch.Tensor) and k in kept
                ]
                errors[i] = max([errors[i], *(rms(a - b) / rms(b) for a, b in pairs if rms(b))])
    except Exception:  # a build that cannot take this step says so where it is judged
        return EXACT
    return candidates[errors.index(min(errors))]


def scalar_directions(rule: Rule, expected: Expected) -> list[torch.Tensor]:
    """Return an orthonormal basis of the ways in which rounded scalars can change an update.

    Args:
        rule: the rule.
        expected: the update it makes, its options told of the scalars.
    """
    theta, gradient, state, options = expected.theta, expected.gradient, expected.before, expected.options
    scalars: Scalars = options[SCALARS]
    seen: list[Any] = []
    base = reference_update(
        rule, theta, gradient, dict(state), {**options, SCALARS: dataclasses.replace(scalars, seen=seen)}
    )
    basis: list[torch.Tensor] = []
    for key in seen:
        turned = {**options, SCALARS: dataclasses.replace(scalars, stretched=key)}
        direction = (reference_update(rule, theta, gradient, dict(state), turned) - base).reshape(-1)
        size = float(torch.linalg.vector_norm(direction))
        direction = without(direction, basis)
        rest = float(torch.linalg.vector_norm(direction))
        if rest > COLLINEAR * size:
            basis.append(direction / rest)
    return basis


def without(vector: torch.Tensor, basis: list[torch.Tensor]) -> torch.Tensor:
    """Return the part of a flat vector that is orthogonal to a basis."""
    for direction in basis:
        vector = vector - torch.dot(vector, direction) * direction
    return vector


def limit_beside_scalars(
    rule: Rule, difference: torch.Tensor, expected: Expected, without_term: Mapping[str, Any], eps: float
) -> float:
    """Return the relative error of one term of the rule that would show beside rounded scalars.

    Rounded scalars stretch an update's gradient part, and that alone; a decay that is off adds weights to it, which is
    something else: what is left of the difference without the scalars' directions bounds it.

    Args:
        rule: the rule.
        difference: update minus reference, float64.
        expected: the update it makes, its options told of the scalars.
        without_term: options that take the term out.
        eps: of the lane's dtype.

    Returns:
        ``4 (rest of difference + eps (theta + d)) / rest of the term``: infinite for a term that scalars could make.
    """
    theta, gradient, state, options = expected.theta, expected.gradient, expected.before, expected.options
    basis = scalar_directions(rule, expected)
    update = reference_update(rule, theta, gradient, dict(state), options)
    bare = reference_update(rule, theta, gradient, dict(state), {**options, **without_term})
    term = rms(without((update - bare).reshape(-1), basis))
    rest = rms(without(difference.reshape(-1), basis))
    return 4.0 * (rest + eps * (rms(theta) + rms(update))) / term if term else float("inf")
