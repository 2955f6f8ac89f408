"""Rows of an optimizer with a declared coarse state: the probe on uniform tensors, real steps from fresh state."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from audits.causes import Cause
from audits.live.subject import LivePhase, Subject
from audits.outcomes import Lane, Outcome, ResultRow
from audits.recipe.optimizers import RUNNING
from audits.recipe.phases import ParameterGroup
from audits.updates.compare import deviation, judge, real_dtype
from audits.updates.judge.apply_rule import reference_update
from audits.updates.judge.coarse_state import CoarseState, CoarseVerdict, judge_uniform
from audits.updates.judge.conditioning import judge_conditioned
from audits.updates.judge.expected import Expected, expect
from audits.updates.judge.replay import Replay
from audits.updates.record.calls import Call
from audits.updates.rules import Rule
from audits.updates.rules.base import DECLARE
from audits.updates.update_rows import norm, row

_KNOWN: weakref.WeakKeyDictionary[LivePhase, CoarseVerdict] = weakref.WeakKeyDictionary()


def uniform_row(subject: Subject, phase: LivePhase, rule: Rule, coarse: CoarseState) -> ResultRow:
    """Return the ``optimizer.probe`` row.

    Args:
        subject: the model under audit.
        phase: whose optimizer.
        rule: its rule.
        coarse: what is coarse in its state.
    """
    name = phase.recipe.optimizer.class_path
    common: dict[str, Any] = {"phase": phase.name, "lane": Lane.SYNTHETIC}
    try:
        found = _verdict(phase, rule, coarse)
    except Exception as error:  # the class is the user's
        message = f"{name} could not take synthetic gradients: {type(error).__name__}: {error}"
        return row(subject, "optimizer.probe", Outcome.INCONCLUSIVE, message, cause=Cause.PROBE_RAISED, **common)
    common |= {"error": found.error, "threshold": found.threshold}
    if found.outcome is Outcome.PASS:
        message = (f"{name} keeps its state in {coarse.description} and follows {rule.title} over 8 synthetic steps on "
                   "uniform tensors, whose state is known to a rounding")  # fmt: skip
        return row(subject, "optimizer.probe", Outcome.PASS, message, **common)
    if found.outcome is Outcome.FAIL:
        message = (f"{name}, whose state is in {coarse.description}, leaves {rule.title}: {found.text}, more than "
                   "rounding explains")  # fmt: skip
        return row(subject, "optimizer.probe", Outcome.FAIL, message + (DECLARE if rule.guessed else ""), **common)
    message = (f"{name} keeps its state in {coarse.description}, which rounds too coarsely to be held to {rule.title}: "
               "audit the same optimizer with its state in float32, or in 8 bits")  # fmt: skip
    return row(subject, "optimizer.probe", Outcome.INCONCLUSIVE, message, cause=Cause.COARSE_STATE, **common)


def _verdict(phase: LivePhase, rule: Rule, coarse: CoarseState) -> CoarseVerdict:
    if phase not in _KNOWN:
        _KNOWN[phase] = judge_uniform(phase, rule, coarse)
    return _KNOWN[phase]


def coarse_step_rows(
    subject: Subject, phase: LivePhase, rule: Rule, coarse: CoarseState, call: Call, wanted: list[str]
) -> Iterator[ResultRow]:
    """Yield ``update.rule`` of each parameter that received a gradient: this step once more, from fresh state.

    Args:
        subject: the model under audit.
        phase: the phase.
        rule: its rule.
        coarse: what is coarse in its state: it cannot be started from.
        call: the recorded call.
        wanted: the parameters.
    """
    # What the group counts is the live optimizer's: a fresh one begins anew.
    call = dataclasses.replace(call, options={n: _uncounted(own) for n, own in call.options.items()})
    recipe = phase.recipe.optimizer
    recipe = dataclasses.replace(
        recipe, groups=tuple(ParameterGroup(_uncounted(g.options), g.parameters) for g in recipe.groups)
    )
    held = {n: call.before[n] for n in dict.fromkeys(recipe.names)}
    updates: dict[str, torch.Tensor] = {}
    trouble = ""
    try:
        updates = Replay(recipe, held, None, {}).step(call.before, call.gradients, call.options)
    except Exception as raised:
        trouble = f"it could not be stepped from fresh state: {type(raised).__name__}: {raised}"
    for name in wanted:
        reference = expect(rule, phase, call, name, {})
        if reference is None:
            continue
        numbers: dict[str, Any] = {"phase": phase.name, "step": call.step, "parameter": name, "lane": Lane.NATIVE}
        numbers |= {"expected": norm(reference.update), "gradient_norm": norm(reference.gradient)}
        if name not in updates:
            yield row(
                subject, "update.rule", Outcome.INCONCLUSIVE, f"{name}: {trouble}", cause=Cause.COARSE_STATE, **numbers
            )
            continue
        error, threshold = _error(rule, coarse, reference, updates[name], real_dtype(call.before[name].dtype))
        numbers |= {"measured": norm(updates[name]), "error": error, "threshold": threshold}
        title = f"{rule.title}, from fresh state, for its own is in {coarse.description}"
        if error <= threshold:
            message = f"{name} moves as {title}, says (step {call.step})"
            yield row(subject, "update.rule", Outcome.PASS, message, **numbers)
        elif _verdict(phase, rule, coarse).outcome is Outcome.FAIL:
            message = f"{name} does not move as {title}, says (step {call.step}): see optimizer.probe"
            yield row(subject, "update.rule", Outcome.FAIL, message, **numbers)
        else:
            message = (f"{name} does not move as {title}, says (step {call.step}), which rounding its state may "
                       "explain: optimizer.probe follows the rule where that is known; audit it with its state in "
                       "float32")  # fmt: skip
            yield row(subject, "update.rule", Outcome.INCONCLUSIVE, message, cause=Cause.COARSE_STATE, **numbers)


def _uncounted(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in RUNNING}


def _error(
    rule: Rule, coarse: CoarseState, reference: Expected, actual: torch.Tensor, dtype: torch.dtype
) -> tuple[float, float]:  # fmt: skip
    """Return (error, threshold), beside what rounding the new state to a coarse floating dtype changes."""
    judged = judge_conditioned(rule, actual, dataclasses.replace(reference, before={}, noise=0.0), dtype)
    if not judged.met and coarse.floating:
        # Two moments, each rounded by half a spacing h: a quotient is off by (1 + h) / (1 - h) at most.
        rounding = 2.0 * coarse.half / (1.0 - coarse.half)
        bare = {**reference.options, "weight_decay": 0.0}
        moments = reference_update(rule, reference.theta, reference.gradient, {}, bare).abs()
        off = actual - reference.update
        left = off.sign() * (off.abs() - rounding * moments).clamp(min=0.0)
        judged = judge(deviation(reference.update + left, reference.update, reference.theta, dtype), rule, dtype,
                       reference.options)  # fmt: skip
    return judged.error, judged.threshold
