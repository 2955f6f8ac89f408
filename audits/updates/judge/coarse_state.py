"""An optimizer whose rule is known and whose state is coarser than the weights, as its name or an option declares.

Eight bits in blocks, bfloat16: what is rounded so no rule can follow from step to step, on gradients of any kind. It
is held to its rule where rounding is known. On gradients that are one number throughout a tensor, a block's scale holds
the state exactly, and where it does not, each step rounds it by half a spacing at most; and two tensors of the same
gradients and other weights have the same state, so that what depends on the weights (the decay) shows exactly.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from audits.live.subject import LivePhase
from audits.outcomes import Outcome
from audits.recipe.optimizers import RUNNING
from audits.recipe.phases import ParameterGroup
from audits.updates.judge.apply_rule import copy_state, reference_update, rule_options
from audits.updates.judge.expected import Expected
from audits.updates.judge.own_attributes import attributes_of
from audits.updates.judge.replay import Replay
from audits.updates.rules import Rule, State
from audits.updates.rules.coarse_names import declares

#: Shapes of a group's tensors: whole blocks and a tail; the first two share their gradients, the last two a shape.
SHAPES: tuple[tuple[int, ...], ...] = ((1031,), (24, 17), (24, 17))
#: Their weights, one number each, and how large their gradients are.
WEIGHTS, SIZES = (0.5, -2.0, 1.0), (1.0, 1.0, 3.0)

#: The gradient of every step: of one sign, so that no moment passes near zero, where a rounding is large beside it.
SCALES = (1.0, 0.5, 0.0, 4.0, 0.25, 1.0, 1.0, 0.1)

#: Roundings of float32 in an update that is exact but for them.
ROUNDINGS = 16.0

#: Two moments, each off by half a spacing a step at most; the root of the second is, where the root is what is kept.
MOMENTS = 2.0

#: Groups that are probed, as many as the probe of other optimizers takes.
MAX_GROUPS = 6

#: Relative error from which a test of the gradient's part says nothing.
VACUOUS = 0.5


@dataclass(frozen=True)
class CoarseState:
    """What is coarse: the dtype, in words, and half its spacing.

    That is relative to each number where it is ``floating``, to the largest of a block elsewhere.
    """

    description: str
    half: float
    floating: bool = False

    @property
    def tolerance(self) -> float:
        """Relative error that rounding may make of an update of the probe."""
        return MOMENTS * len(SCALES) * self.half


@dataclass(frozen=True)
class CoarseVerdict:
    """What the probe found: the outcome, the text, the worst error and what it was held against."""

    outcome: Outcome
    text: str
    error: float
    threshold: float


_KNOWN: weakref.WeakKeyDictionary[LivePhase, CoarseState | None] = weakref.WeakKeyDictionary()


def coarse_state(phase: LivePhase, rule: Rule) -> CoarseState | None:
    """Return what of a phase's state is declared to be coarser than float32, or None.

    Args:
        phase: whose optimizer.
        rule: its rule; one that rounds its state itself needs none of this.
    """
    if phase not in _KNOWN:
        _KNOWN[phase] = _found(phase) if rule.found and not rule.rounds else None
    return _KNOWN[phase]


def _found(phase: LivePhase) -> CoarseState | None:
    options = [key for group in phase.recipe.optimizer.groups for key in group.options]
    if not declares(phase.recipe.optimizer, options, attributes_of(phase).values()):
        return None
    try:
        replay = _replay(phase, _groups(phase)[:1])
        replay.step(*_tensors(phase, list(replay.copies), SCALES[0]), {})
    except Exception:  # a build that cannot take this step says so where it is judged
        return None
    found = [
        coarse
        for copy in replay.copies.values()
        for value in replay.optimizer.state[copy].values()
        if isinstance(value, torch.Tensor) and (coarse := _coarse(value, copy.numel())) is not None
    ]
    return max(found, key=lambda c: c.half, default=None)


def _coarse(value: torch.Tensor, count: int) -> CoarseState | None:
    if value.numel() <= 1:
        return None
    if type(value) not in (torch.Tensor, torch.nn.Parameter):  # a tensor that packs others: by its name, or 8 bits
        bits = 4 if "4bit" in type(value).__name__.lower() else 8
        return CoarseState(type(value).__name__, _half_of(bits))
    if value.is_floating_point():
        eps = float(torch.finfo(value.dtype).eps)
        return CoarseState(str(value.dtype), eps / 2.0, floating=True) if eps > torch.finfo(torch.float32).eps else None
    if value.dtype in (torch.uint8, torch.int8) and 2 * value.numel() >= count:
        return CoarseState(str(value.dtype), _half_of(8 if value.numel() >= count else 4))
    return None


def _half_of(bits: int) -> float:
    """Half the spacing of ``2^bits`` evenly spaced numbers from -1 to 1; those of a dynamic map are closer below 1."""
    return 0.5 / (2.0 ** (bits - 1) - 1.0)


def judge_uniform(phase: LivePhase, rule: Rule, coarse: CoarseState) -> CoarseVerdict:
    """Hold a phase's optimizer, in its groups, to its rule on tensors of one number each, in float32.

    Args:
        phase: whose optimizer.
        rule: its rule.
        coarse: what `coarse_state` found.
    """
    groups = _groups(phase)
    replay = _replay(phase, groups)
    chosen = {n: rule_options(phase, options, torch.float32) for options, names in groups for n in names}
    states: dict[str, State] = {name: {} for name in chosen}
    vacuous = coarse.tolerance >= VACUOUS
    worst = CoarseVerdict(Outcome.PASS, "", 0.0, coarse.tolerance)
    for number, scale in enumerate(SCALES, start=1):
        weights, gradients = _tensors(phase, list(states), scale)
        updates = replay.step(weights, gradients, {})
        expected = {}
        for name, state in states.items():
            before, weight = copy_state(state), weights[name].double()
            update = reference_update(rule, weight, gradients[name], state, chosen[name])
            expected[name] = Expected(weight, update, {}, before, chosen[name], gradients[name])
        for name, reference in expected.items():
            update = reference.update
            size, theta = float(update.abs().max()), float(weights[name].abs().max())
            off = float((updates[name] - update).abs().max())
            error = max(0.0, off - _rounding(theta + size)) / size if size else float(off > _rounding(theta))
            if not error <= coarse.tolerance and not vacuous:
                return CoarseVerdict(Outcome.FAIL, f"at step {number} an update is {error:.2%} off", error,
                                     coarse.tolerance)  # fmt: skip
            if error > worst.error:
                worst = dataclasses.replace(worst, error=error)
        for _, (one, other, *_) in groups:
            if apart := _beside_each_other(rule, coarse, (one, other), updates, expected):
                return CoarseVerdict(Outcome.FAIL, f"at step {number} {apart}", worst.error, coarse.tolerance)
    if vacuous and worst.error > VACUOUS:
        return dataclasses.replace(worst, outcome=Outcome.INCONCLUSIVE)
    return worst


def _beside_each_other(
    rule: Rule,
    coarse: CoarseState,
    names: tuple[str, str],
    updates: Mapping[str, torch.Tensor],
    expected: Mapping[str, Expected],
) -> str:
    """Compare two tensors of the same gradients and other weights; what their states' rounding changes is allowed."""
    if not rule.elementwise:
        return ""
    one, other = (expected[name] for name in names)
    wanted = float(one.update.mean() - other.update.mean())
    found = float(updates[names[0]].mean() - updates[names[1]].mean())

    def apart(factor: float) -> float:
        moved = []
        for each in (one, other):
            state = {k: v * factor if isinstance(v, torch.Tensor) else v for k, v in each.before.items()}
            moved.append(float(reference_update(rule, each.theta, each.gradient, state, each.options).mean()))
        return moved[0] - moved[1]

    size = sum(float(t.abs().max()) for each in (one, other) for t in (each.theta, each.update))
    slack = max(abs(apart(1.0 + sign * coarse.tolerance) - wanted) for sign in (1.0, -1.0))
    if abs(found - wanted) <= _rounding(size) + slack:
        return ""
    return (f"what the weights {WEIGHTS[0]} and {WEIGHTS[1]} change of an update is {found:.3g}, the rule's "
            f"{wanted:.3g}: the decay is another")  # fmt: skip


def _rounding(size: float) -> float:
    return ROUNDINGS * float(torch.finfo(torch.float32).eps) * size


def _groups(phase: LivePhase) -> list[tuple[dict[str, Any], tuple[str, ...]]]:
    """Return the options of each group, up to `MAX_GROUPS` different ones, and the names of its tensors."""
    found: list[dict[str, Any]] = []
    for group in phase.recipe.optimizer.groups:
        options = {key: value for key, value in group.options.items() if key not in RUNNING}
        if not options.get("lr", 1.0):  # a schedule at 0 shows nothing
            options["lr"] = options.get("initial_lr") or phase.recipe.optimizer.defaults.get("lr") or 1e-3
        if options not in found:
            found.append(options)
    return [(o, tuple(f"uniform.{g}.{i}" for i in range(len(SHAPES)))) for g, o in enumerate(found[:MAX_GROUPS])]


def _replay(phase: LivePhase, groups: list[tuple[dict[str, Any], tuple[str, ...]]]) -> Replay:
    held = tuple(ParameterGroup(dict(options), names) for options, names in groups)
    recipe = dataclasses.replace(phase.recipe.optimizer, groups=held, state={})
    names = [name for _, own in groups for name in own]
    return Replay(recipe, _tensors(phase, names, 1.0)[0], torch.float32, {})


def _tensors(
    phase: LivePhase, names: list[str], scale: float
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:  # fmt: skip
    """Return the weights and a step's gradients."""
    device = next(iter(phase.parameters.values())).device
    weights, gradients = {}, {}
    for name in names:
        i = int(name.rpartition(".")[2])
        weights[name] = torch.full(SHAPES[i], WEIGHTS[i], device=device)
        gradients[name] = torch.full(SHAPES[i], scale * SIZES[i], device=device)
    return weights, gradients
