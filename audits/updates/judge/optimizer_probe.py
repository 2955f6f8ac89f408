"""The optimizer build on synthetic gradients: its rule, its implementations against each other, its state saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.optimizer import _default_to_fused_or_foreach

from audits.causes import Cause
from audits.live.subject import LivePhase, Subject
from audits.outcomes import Lane, Outcome, ResultRow
from audits.updates.compare import THRESHOLDS, Deviation, Judgement, deviation, judge, real_dtype, rms, to_double
from audits.updates.judge.apply_rule import rule_for
from audits.updates.judge.coarse_rows import uniform_row
from audits.updates.judge.coarse_state import coarse_state
from audits.updates.judge.conditioning import judge_conditioned
from audits.updates.judge.expected import Expected
from audits.updates.judge.masters import masters_of
from audits.updates.judge.other_rules import explain
from audits.updates.judge.replay import Replay
from audits.updates.judge.round_trip import round_trip
from audits.updates.judge.synthetic import Synthetic, reference_updates, synthesize
from audits.updates.judge.whose_step import torch_owned
from audits.updates.relations import round_trip_rows
from audits.updates.rules import RULES, Rule
from audits.updates.rules.base import DECLARE, SCALARS
from audits.updates.update_rows import row

#: Relative change of an update by rounded scalars that is worth a note on the build: Adam's is 1e-5, RAdam's 6e-3.
NOTED = 1e-3

#: Options that choose an implementation, switched to the plain loop.
LOOP = {"foreach": False, "fused": False}

#: Stands in for the rule where implementations of an unknown one are compared: plain thresholds.
_ANY = RULES["SGD"]
_EQUAL = Deviation(0.0, 0.0, 0.0, 1.0)


@dataclass(frozen=True)
class ProbeFailure:
    """The worst departure from the rule in a probe."""

    tensor: str
    step: int
    lane: Lane
    error: float
    threshold: float
    because: str


def probe_rows(subject: Subject, phase: LivePhase, seed: int) -> list[ResultRow]:
    """Return ``optimizer.probe``, ``optimizer.parity`` and ``registration.state-round-trip`` of a phase."""
    wants = subject.settings.wants_check
    rule = rule_for(subject, phase)
    if rule is None:
        return _without_rule(subject, phase, seed)
    synthetic = synthesize(subject, phase, rule, seed)
    rows: list[ResultRow] = []
    if not synthetic.native:
        return [row(subject, "optimizer.probe", Outcome.INCONCLUSIVE, f"the optimizer of phase {phase.name!r} holds no "
                    "parameter of the model", phase=phase.name, cause=Cause.NOTHING_HELD)]  # fmt: skip
    coarse = coarse_state(phase, rule)
    if wants("optimizer.probe", "update.rule"):
        rows.append(uniform_row(subject, phase, rule, coarse) if coarse else _probe(subject, phase, synthetic, rule))
    if wants("optimizer.parity"):
        rows.append(_parity(subject, phase, synthetic, rule))
    if wants("registration.state-round-trip"):
        rows.append(round_trip(subject, phase, synthetic, rule, coarse))
    return rows


def _without_rule(subject: Subject, phase: LivePhase, seed: int) -> list[ResultRow]:
    """Return the probe's rows of a class that relations judge: only its state has a row of its own."""
    message = f"there is no reference rule for {phase.recipe.optimizer.class_path}: see optimizer.invariants"
    rows = [
        row(
            subject,
            check,
            Outcome.SKIPPED,
            message,
            phase=phase.name,
            lane=Lane.SYNTHETIC,
            cause=Cause.NO_REFERENCE_RULE,
        )
        for check in ("optimizer.probe", "optimizer.parity")
    ]
    return [*rows, *round_trip_rows(subject, phase, seed)]


def _probe(subject: Subject, phase: LivePhase, synthetic: Synthetic, rule: Rule) -> ResultRow:
    check = "optimizer.probe"
    name = phase.recipe.optimizer.class_path
    common: dict[str, Any] = {"phase": phase.name, "lane": Lane.SYNTHETIC}
    try:
        worst, failure = run_probe(phase, synthetic, rule)
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        message = f"{name} could not take synthetic gradients: {type(error).__name__}: {error}"
        return row(subject, check, Outcome.INCONCLUSIVE, message, cause=Cause.PROBE_RAISED, **common)
    if failure is None:
        off, step = rounded_scalars(phase, synthetic, rule)
        if off > NOTED:
            message = (f"{name} works out its scalars in float32, which is off by {off:.2%} of an update at synthetic "
                       f"step {step}: a weakness of this torch build's capturable path, not of the model")  # fmt: skip
            return row(subject, check, Outcome.WARN, message, step=step, error=worst[0], threshold=worst[1],
                       cause=Cause.ENVIRONMENT, **common)  # fmt: skip
        message = f"{name} follows {rule.title} over 8 synthetic steps"
        return row(subject, check, Outcome.PASS, message, error=worst[0], threshold=worst[1], **common)
    dtype = synthetic.native[failure.tensor]
    message = (f"{name} leaves {rule.title} at synthetic step {failure.step} on {dtype} weights: error "
               f"{failure.error:.3g} against {failure.threshold:.3g}")  # fmt: skip
    cause, because = whose_fault(phase, synthetic, rule, failure)
    message += (f"; {because}" if because else "") + (DECLARE if rule.guessed else "")
    return row(subject, check, Outcome.FAIL, message, step=failure.step, error=failure.error,
               threshold=failure.threshold, dtype=str(dtype), cause=cause, **common)  # fmt: skip


def run_probe(
    phase: LivePhase, synthetic: Synthetic, rule: Rule, overrides: Mapping[str, Any] | None = None
) -> tuple[tuple[float, float], ProbeFailure | None]:
    """Run the build over the probe in the native dtypes and in float64.

    Args:
        phase: whose optimizer.
        synthetic: the probe's tensors.
        rule: the rule it should follow.
        overrides: options that choose another implementation.

    Returns:
        ((worst error, its threshold), the first failing step's worst tensor or None).
    """
    worst, ratio, failure = (0.0, 1.0), -1.0, None
    overrides = {k: v for k, v in (overrides or {}).items() if any(k in o for o in synthetic.options.values())}
    lanes: tuple[tuple[str, torch.dtype | None, Lane], ...] = (
        ("weights", None, Lane.NATIVE), ("wide", torch.float64, Lane.FLOAT64)
    )  # fmt: skip
    if masters_of(phase.recipe.optimizer):  # copies in float32, whatever the weights are
        lanes = (lanes[0], ("weights", torch.float32, Lane.FLOAT32))
    for lane, dtype, shown in lanes:
        references = reference_updates(phase, synthetic, rule, lane, overrides)
        weights = getattr(synthetic, lane)
        replay = Replay(synthetic.recipe, weights[0], dtype, {}, overrides)
        # The copies remember which dtype the model's own weights have (Adafactor's default eps follows it).
        replay.native.update(synthetic.native)
        for number, reference in enumerate(references, start=1):
            updates = replay.step(weights[number - 1], synthetic.gradients[number - 1], synthetic.options)
            for name, (theta, expected, state, options) in reference.items():
                in_dtype = dtype or real_dtype(synthetic.native[name])
                if not bool(torch.isfinite(expected).all()):
                    continue
                gradient = synthetic.gradients[number - 1][name]
                assert gradient is not None
                noise = rule.noise(theta, to_double(gradient), state, options) if rule.noise else 0.0
                meant = Expected(theta, expected, {}, state, options, gradient, noise)
                found = judge_conditioned(rule, updates[name], meant, in_dtype)
                share = found.error / found.threshold
                if not found.met and (failure is None or (failure.step == number and share > ratio)):
                    because = explain(rule, theta, gradient, state, options, updates[name], in_dtype)
                    failure = ProbeFailure(name, number, shown, found.error, found.threshold, because)
                if share > ratio:
                    worst, ratio = (found.error, found.threshold), share
        if failure is not None:
            return worst, failure
    return worst, failure


def rounded_scalars(phase: LivePhase, synthetic: Synthetic, rule: Rule) -> tuple[float, int]:
    """Return (largest relative change of an update, its step) that a build's rounded scalars make of the exact rule.

    RAdam's rectification is a small difference of large numbers; in float32 three digits of it are left at step 6.
    """
    told = reference_updates(phase, synthetic, rule, "wide")
    if not any(SCALARS in options for step in told for _, _, _, options in step.values()):
        return 0.0, 0
    exact = reference_updates(phase, synthetic, rule, "wide", dict.fromkeys(("fused", "capturable", "differentiable")))
    return max(
        (rms(update - exact[i][name][1]) / (rms(exact[i][name][1]) or 1.0), i + 1)
        for i, step in enumerate(told)
        for name, (_, update, _, _) in step.items()
    )


def whose_fault(phase: LivePhase, synthetic: Synthetic, rule: Rule, failure: ProbeFailure) -> tuple[str | None, str]:
    """Return (cause, half a sentence): the torch build, the dtype's range, or the optimizer itself."""
    if not torch_owned(phase):
        return failure.because or None, failure.because
    if implementations(phase) and run_probe(phase, synthetic, rule, LOOP)[1] is None:
        used = " and ".join(implementations(phase))
        return Cause.ENVIRONMENT, f"the plain loop follows it, so the fault is in this torch build's {used} kernel"
    if synthetic.native[failure.tensor] is torch.float16 and failure.lane is Lane.NATIVE:
        return "precision", "float16 cannot hold eps or the second moment: keep float32 weights and state"
    text = f"no code but torch's is involved: this torch build's {phase.recipe.optimizer.class_path} is at fault"
    return Cause.ENVIRONMENT, f"{failure.because}; {text}" if failure.because else text


def implementations(phase: LivePhase) -> list[str]:
    """Return which of ``fused`` and ``foreach`` the build runs; empty for the plain loop.

    torch takes foreach by default on CUDA and on other accelerators.
    """
    options = [group.options for group in phase.recipe.optimizer.groups]
    if any(o.get("fused") for o in options):
        return ["fused"]
    _, by_default = _default_to_fused_or_foreach(list(phase.parameters.values()), differentiable=False)
    if any(o.get("foreach") or (by_default and "foreach" in o and o["foreach"] is None) for o in options):
        return ["foreach"]
    return []


def _parity(subject: Subject, phase: LivePhase, synthetic: Synthetic, rule: Rule | None) -> ResultRow:
    check = "optimizer.parity"
    common: dict[str, Any] = {"phase": phase.name, "lane": Lane.SYNTHETIC}
    used = implementations(phase)
    if not used:
        return row(
            subject,
            check,
            Outcome.SKIPPED,
            "torch steps this optimizer by its plain loop here: there is no other way to compare",
            cause=Cause.PLAIN_LOOP,
            **common,
        )
    overrides = {k: v for k, v in LOOP.items() if any(k in o for o in synthetic.options.values())}
    try:
        build, loop = (Replay(synthetic.recipe, synthetic.weights[0], None, {}, o) for o in ({}, overrides))
        meant = None if rule is None else [
            reference_updates(phase, synthetic, rule, "weights", o) for o in ({}, overrides)
        ]  # fmt: skip
        worst = Judgement(0.0, THRESHOLDS[torch.float32][0], True)
        at = "to the last bit"
        for number, (weights, gradients) in enumerate(
            zip(synthetic.weights, synthetic.gradients, strict=True), start=1
        ):
            one = build.step(weights, gradients, synthetic.options)
            other = loop.step(weights, gradients, synthetic.options)
            for name in one:
                dtype = real_dtype(synthetic.native[name])
                options: Mapping[str, Any] = synthetic.options[name]
                apart: torch.Tensor | float = 0.0
                if meant is not None:  # the two may work out their scalars in different precisions
                    (_, first, _, options), (_, second, _, _) = (steps[number - 1][name] for steps in meant)
                    apart = first - second if SCALARS in options else 0.0
                found = deviation(one[name] - apart, other[name], to_double(weights[name]), dtype)
                judged = judge(found, rule or _ANY, dtype, options)
                if judged.error / judged.threshold > worst.error / worst.threshold:
                    worst, at = judged, f"(worst at step {number} on {synthetic.native[name]} weights)"
    except (RuntimeError, TypeError, ValueError) as problem:
        return row(subject, check, Outcome.INCONCLUSIVE, f"{used[0]} could not be compared: {problem}",
                   cause=Cause.PROBE_RAISED, **common)  # fmt: skip
    message = f"the {used[0]} implementation {'agrees with' if worst.met else 'departs from'} the plain loop {at}"
    return row(subject, check, Outcome.PASS if worst.met else Outcome.FAIL, message, error=worst.error,
               threshold=worst.threshold, cause=Cause.ENVIRONMENT if not worst.met and torch_owned(phase) else None,
               **common)  # fmt: skip
