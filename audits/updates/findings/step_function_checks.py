"""How the recipe's own step function handles its optimizers: count, clipping, learning rate, mode."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from audits.causes import Cause
from audits.checks.step import NORM, NORM_LOW, RATE, RATE_TENSOR
from audits.live.subject import LivePhase, Subject
from audits.outcomes import Outcome, ResultRow
from audits.updates.compare import real_dtype
from audits.updates.findings.hyperparameters import declared_option
from audits.updates.received.found import BeforeStep
from audits.updates.record.calls import Call
from audits.updates.record.step_listener import ClippingCall
from audits.updates.steps import TrainingStep
from audits.updates.update_rows import row

#: What only a recipe's own step function can get wrong.
CANONICAL_ONLY = ("step.clipping", "step.count", "step.learning-rate", "step.mode")

#: Relative error of the norm that clipping saw.
NORM_TOLERANCE = {torch.bfloat16: NORM_LOW.value, torch.float16: NORM_LOW.value}


def skipped_step_function_rows(subject: Subject) -> list[ResultRow]:
    """Return the rows that a canonical step cannot fail, as skipped."""
    message = "the recipe has no step function: the step is the audit's own and cannot get this wrong"
    return [row(subject, check, Outcome.SKIPPED, message, cause=Cause.CANONICAL_STEP) for check in CANONICAL_ONLY]


def idle_group_rows(subject: Subject, steps: Sequence[TrainingStep]) -> Iterator[ResultRow]:
    """Yield a warning for each group of trainable parameters whose rate is 0 in all that is known of its training.

    A step that sets the rate itself knows more than the recipe.
    """
    for phase in subject.phases:
        for number, group in enumerate(phase.recipe.optimizer.groups):
            names = [name for name in group.parameters if isinstance(name, str) and name in phase.parameters]
            rate = phase.assumed_rates.get(names[0]) if names else None
            if rate is None or not rate.never:
                continue
            used = (call.options.get(names[0], {}).get("lr") for step in steps for call in step.of(phase))
            if any(rate.replaced_by(each) for each in used):
                continue
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            when = "at every step of the schedule" if phase.recipe.scheduler is not None else "and there is no schedule"
            message = (f"group {number} of the optimizer of phase {phase.name!r} ({names[0]}{others}) has the learning "
                       f"rate 0 {when}: it is trainable and never trained. To do: give it a rate, or freeze it "
                       "(requires_grad_(False)) and leave it out of the optimizer")  # fmt: skip
            yield row(subject, "step.learning-rate", Outcome.WARN, message, phase=phase.name, parameter=names[0],
                      cause=Cause.RATE_IS_ZERO, measured=0.0)  # fmt: skip


def step_function_rows(subject: Subject, step: TrainingStep) -> Iterator[ResultRow]:
    """Yield the rows of one training step of the recipe's own step function."""
    for phase in subject.phases:
        yield _count(subject, step, phase)
        yield from _clipping(subject, step, phase)
        yield from _learning_rate(subject, step, phase)
    yield _mode(subject, step)


def with_own_places(subject: Subject, rows: list[ResultRow]) -> list[ResultRow]:
    """Return the rows, failing ones with the place that a framework's step names: its options, its user's methods.

    A step that is an object may have a method ``where_to_look(check) -> text or None``.
    """
    step = subject.recipe.step
    look = None if step is None else getattr(step.resolve(role="step"), "where_to_look", None)
    if look is None:
        return rows
    found: dict[str, str | None] = {}

    def placed(r: ResultRow) -> ResultRow:
        if r.outcome is not Outcome.FAIL:
            return r
        if r.check not in found:
            found[r.check] = look(r.check)
        own = found[r.check]
        return r if own is None else dataclasses.replace(r, where_to_look=f"{own} {r.where_to_look or ''}".rstrip())

    return [placed(r) for r in rows]


def _count(subject: Subject, step: TrainingStep, phase: LivePhase) -> ResultRow:
    count = len(step.of(phase))
    numbers: dict[str, Any] = {"measured": float(count), "expected": 1.0}
    message = f"the optimizer of phase {phase.name!r} stepped {count} times in training step {step.number}"
    if count == 0 and step.overflowed:
        return row(subject, "step.count", Outcome.INCONCLUSIVE, f"{message}: the loss scaler met an overflow",
                   phase=phase.name, step=step.number, cause=Cause.OVERFLOW, **numbers)  # fmt: skip
    outcome = Outcome.PASS if count == 1 else Outcome.FAIL
    return row(subject, "step.count", outcome, message, phase=phase.name, step=step.number, **numbers)


def _clipping(subject: Subject, step: TrainingStep, phase: LivePhase) -> Iterator[ResultRow]:
    check, declared = "step.clipping", phase.recipe.clip_grad_norm
    for call in step.of(phase):
        before = call.note
        seen = before.clipping if isinstance(before, BeforeStep) else []
        reference = before.reference if isinstance(before, BeforeStep) else None
        where = f"phase {phase.name!r}, step {step.number}"
        common: dict[str, Any] = {"phase": phase.name, "step": step.number}
        bound = subject.recipe.expect.get("clip_grad_value")
        if declared is None and not seen and bound is not None:
            yield _by_value(subject, call, float(bound), where, common)
            continue
        if declared is None and not seen:
            message = "the recipe declares no clipping"
            yield row(subject, check, Outcome.SKIPPED, message, cause=Cause.NOT_DECLARED, **common)
        elif declared is None:
            message = f"gradients are clipped to {seen[0].max_norm:g} ({where}), which the recipe does not declare"
            yield row(
                subject, check, Outcome.WARN, message, cause=Cause.NOT_DECLARED, measured=seen[0].max_norm, **common
            )
        elif reference is not None and len(seen) > 1:
            message = f"gradients are clipped {len(seen)} times ({where})"
            yield row(subject, check, Outcome.FAIL, message, measured=float(len(seen)), expected=1.0, **common)
        elif reference is not None and seen and abs(seen[0].max_norm - declared) > RATE_TENSOR.value * declared:
            message = f"gradients are clipped to {seen[0].max_norm:g}, the recipe declares {declared:g} ({where})"
            yield row(subject, check, Outcome.FAIL, message, measured=seen[0].max_norm, expected=declared, **common)
        elif reference is not None:
            dtypes = (real_dtype(p.dtype) for p in phase.parameters.values())
            tolerance = max((NORM_TOLERANCE.get(dtype, NORM.value) for dtype in dtypes),
                            default=NORM.value)  # fmt: skip
            measured, expected, message = _norms(
                call, phase, declared, seen[0] if seen else None, reference.norm, where
            )
            error = abs(measured - expected) / expected if expected else measured
            outcome = Outcome.PASS if error <= tolerance else Outcome.FAIL
            if outcome is Outcome.FAIL and seen and not measured:
                message += ": it was given no gradients (a generator that was used up?)"
            yield row(subject, check, outcome, message, measured=measured, expected=expected, error=error,
                      threshold=tolerance, **common)  # fmt: skip


def _norms(
    call: Call, phase: LivePhase, declared: float, seen: ClippingCall | None, reference: float, where: str
) -> tuple[float, float, str]:
    """Return the norm that torch's clipping saw, or that arrived at the optimizer, the norm it should be, and both."""
    if seen is not None:
        kind = "norm" if seen.order == 2.0 else f"norm of order {seen.order:g}"
        text = f"clipping saw the {kind} {seen.norm:.6g}, the loss's own norm is {reference:.6g} ({where})"
        return seen.norm, reference, text
    received = [g for n in phase.parameters if (g := call.gradients.get(n)) is not None]
    arrived = sum(float(g.to_dense().double().square().sum()) for g in received) ** 0.5
    wanted = min(reference, declared)
    return arrived, wanted, (
        f"the gradient's norm at the optimizer is {arrived:.6g}, as declared it is {wanted:.6g} ({where})"
    )  # fmt: skip


def _by_value(subject: Subject, call: Call, bound: float, where: str, common: dict[str, Any]) -> ResultRow:
    received = [g for n in call.phase.parameters if (g := call.gradients.get(n)) is not None and g.numel()]
    largest = max((float(g.to_dense().abs().max()) for g in received), default=0.0)
    met = largest <= bound * (1 + RATE_TENSOR.value)
    message = (
        f"the largest element of the gradient is {largest:.6g}, clipped by value it is at most {bound:g} ({where})"
    )
    return row(subject, "step.clipping", Outcome.PASS if met else Outcome.FAIL, message, measured=largest,
               expected=bound, **common)  # fmt: skip


@dataclass(frozen=True)
class _Rate:
    """The learning rate of one group in one step: what was used, what was to be expected, and why."""

    parameter: str
    used: float
    expected: float
    source: str

    @property
    def error(self) -> float:
        return abs(self.used - self.expected) / abs(self.expected) if self.expected else abs(self.used)


def _rates(subject: Subject, phase: LivePhase, call: Call, scheduled: Sequence[float] | None) -> Iterator[_Rate]:
    """Yield the groups' rates. The schedule comes first, then what ``expect`` declares, then the captured rate."""
    declared = subject.recipe.expect.get("lr")
    for index, group in enumerate(phase.recipe.optimizer.groups):
        name = next((p for p in group.parameters if isinstance(p, str)), None)
        if name is None or "lr" not in call.options.get(name, {}):
            continue
        meant = declared_option(declared, phase.name, name)
        expected, source = group.options["lr"], "captured"
        if scheduled is not None:
            expected, source = scheduled[index], "scheduled"
        elif meant is not None and meant != group.options.get("initial_lr") and name not in phase.assumed_rates:
            expected, source = meant, "declared"
        yield _Rate(name, float(call.options[name]["lr"]), float(expected), source)


def _learning_rate(subject: Subject, step: TrainingStep, phase: LivePhase) -> Iterator[ResultRow]:
    check, schedule = "step.learning-rate", phase.recipe.scheduler
    rates = () if schedule is None else schedule.learning_rates
    scheduled = rates[min(step.number - 1, len(rates) - 1)] if rates else None
    for call in step.of(phase):
        limit = RATE_TENSOR.value if call.tensor_rate else RATE.value
        found = list(_rates(subject, phase, call, scheduled))
        # A rate that only the captured one could be held against is the step's own affair once it differs.
        own = [rate for rate in found if rate.source == "captured" and rate.error > limit]
        worst = max((rate for rate in found if rate not in own), key=lambda rate: rate.error, default=None)
        common: dict[str, Any] = {"phase": phase.name, "step": step.number, "threshold": limit}
        if worst is None and own:
            text = (f"the step sets the learning rate itself: {own[0].used:.9g} in step {step.number} of phase "
                    f"{phase.name!r}, {own[0].expected:.9g} when the recipe was captured; the recipe declares neither "
                    "a schedule nor expect={'lr': ...} to hold it against")  # fmt: skip
            yield row(subject, check, Outcome.SKIPPED, text, cause=Cause.NOT_DECLARED, measured=own[0].used,
                      expected=own[0].expected, error=own[0].error, **common)  # fmt: skip
        if worst is None:
            continue
        met = worst.error <= limit
        text = (f"lr is {worst.used:.9g} in step {step.number} of phase {phase.name!r}, {worst.source} is "
                f"{worst.expected:.9g}")  # fmt: skip
        cause = Cause.ASSUMED if phase.schedule_ended else None
        outcome = Outcome.PASS if met else Outcome.FAIL
        if not met and step.number > 1 and rates and worst.used == rates[0][0] and len(set(rates)) > 1:
            outcome, cause = Outcome.INCONCLUSIVE, Cause.NOT_STEPPED
            text += ": the step function never stepped the scheduler, which may run once per epoch"
        if phase.schedule_ended:
            text += " (the schedule has ended at 0: audited at its initial lr)"
        yield row(subject, check, outcome, text, cause=cause, measured=worst.used, expected=worst.expected,
                  error=worst.error, **common)  # fmt: skip


def _mode(subject: Subject, step: TrainingStep) -> ResultRow:
    if not step.modes:
        return row(subject, "step.mode", Outcome.PASS, f"every module ran in its declared mode in step {step.number}",
                   step=step.number)  # fmt: skip
    path, training = min(step.modes.items(), key=lambda found: len(found[0]))
    mode, other = ("train", "eval") if training else ("eval", "train")
    message = (f"{path or 'the model'} ran in {mode} mode in step {step.number}, the recipe declares {other}"
               f" ({len(step.modes)} modules in all)")  # fmt: skip
    return row(subject, "step.mode", Outcome.FAIL, message, step=step.number)
