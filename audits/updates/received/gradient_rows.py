"""The gradient handed over: present, finite, and the declared loss's own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from audits.causes import Cause
from audits.devices import missing_determinism
from audits.globs import matches
from audits.live.subject import Subject
from audits.live.weighing import ALIKE, Weighing
from audits.outcomes import Lane, Outcome, ResultRow, finite
from audits.updates.compare import real_dtype, rms, to_double
from audits.updates.received.agreement import global_rms, gradient_error
from audits.updates.received.batch_use import BatchUse, batch_use
from audits.updates.received.coarseness import dtype_name, gradient_threshold
from audits.updates.received.found import BeforeStep
from audits.updates.received.reference import Reference
from audits.updates.received.regrouped import Groups
from audits.updates.received.search import AGREED
from audits.updates.record.calls import Call
from audits.updates.record.hook_listener import cure
from audits.updates.update_rows import norm, row
from audits.wording import listed

if TYPE_CHECKING:
    from audits.updates.steps import TrainingStep

#: Elements from which two directions that agree cannot agree by chance.
ENOUGH = 16

#: Gradients with a cosine above 1 minus this differ in scale only.
PARALLEL = 1e-3

#: Where a step drew other numbers than its reference, a factor must differ from 1 by so many times the part of the
#: gradient that points elsewhere: two draws differ along the gradient by no more than in any other direction.
BEYOND_DRAWS = 10.0

#: A norm that clipping saw is the loss's own within so much: the scatter of a sum in the coarsest dtype.
SAME_NORM = 1e-2

#: Why a gradient that differs may not be the step's fault.
OTHER_DRAWS = (
    "the step drew random numbers in another order than the loss alone, so they may not compare: call the declared "
    "loss in the step, so that the audit sees where its random numbers begin"
)


def gradient_rows(subject: Subject, steps: list[TrainingStep]) -> Iterator[ResultRow]:
    """Yield ``step.loss-finite``, ``step.gradient-present`` and ``step.gradient`` of all training steps."""
    for step in steps:
        for call in step.calls:
            yield from _of_call(subject, steps, step, call)


def _of_call(subject: Subject, steps: list[TrainingStep], step: TrainingStep, call: Call) -> Iterator[ResultRow]:
    before = call.note
    if not isinstance(before, BeforeStep) or before.reference is None:
        if isinstance(before, BeforeStep) and before.error:
            message = f"the loss of phase {call.phase.name!r} could not be evaluated at its optimizer: {before.error}"
            yield row(subject, "step.gradient", Outcome.INCONCLUSIVE, message, phase=call.phase.name,
                      step=step.number, cause=Cause.NO_REFERENCE)  # fmt: skip
        return
    reference = before.reference
    good = finite(reference.loss) is not None
    message = f"the loss of phase {call.phase.name!r} is {reference.loss:.6g} in step {step.number}"
    yield row(subject, "step.loss-finite", Outcome.PASS if good else Outcome.FAIL, message, phase=call.phase.name,
              step=step.number, measured=reference.loss)  # fmt: skip
    frozen = subject.recipe.expect.get("frozen")
    scale = global_rms(reference.gradients, call.phase.parameters)
    use = batch_use(subject, steps, call)
    for name in call.phase.parameters:
        if not subject.settings.wants_parameter(name) or matches(name, frozen):
            continue  # what is meant to be frozen may well have its gradient zeroed: update.frozen judges it
        if not call.phase.parameters[name].numel():
            continue
        yield _present(subject, call, name, reference)
        if good:
            yield from _same(subject, steps, call, name, before, scale, use)


def _present(subject: Subject, call: Call, name: str, reference: Reference) -> ResultRow:
    received, wanted = call.received.get(name), reference.gradients.get(name)
    where = f"at the optimizer of phase {call.phase.name!r} in step {call.step}"
    outcome, message = Outcome.PASS, f"{name}'s gradient arrived {where}"
    length: float | None = None
    if received is None and wanted is None:
        outcome, message = Outcome.WARN, f"{name} has no gradient {where}: this batch's loss does not depend on it"
        if matches(name, subject.recipe.expect.get("trainable")):
            outcome, message = Outcome.FAIL, f"{name} is declared trainable and {message.removeprefix(f'{name} ')}"
    elif received is None:
        outcome, message = Outcome.FAIL, f"{name} has no gradient {where}, though the loss has one for it"
    elif not math.isfinite(length := norm(received)):
        outcome, message = Outcome.FAIL, f"{name}'s gradient is not finite {where}"
    elif received.numel() and not length:
        if wanted is None or not norm(wanted):
            outcome, message = Outcome.WARN, f"{name}'s gradient is all zero {where}, and so is the loss's own"
        else:
            outcome, message = Outcome.FAIL, f"{name}'s gradient is all zero {where}; the loss's own is not"
    return row(subject, "step.gradient-present", outcome, message, parameter=name, phase=call.phase.name,
               step=call.step, gradient_norm=length)  # fmt: skip


def _same(
    subject: Subject, steps: list[TrainingStep], call: Call, name: str, before: BeforeStep, scale: float,
    use: BatchUse | None,
) -> Iterator[ResultRow]:  # fmt: skip
    reference = before.reference
    assert reference is not None
    received, wanted = call.received.get(name), reference.gradients.get(name)
    if received is None and wanted is None:
        return
    parameter = subject.parameters[name]
    threshold, floor = gradient_threshold(subject, real_dtype(parameter.dtype))
    scatter = before.scatter.get(name, 0.0)
    error = gradient_error(received, wanted, parameter, scale, floor)
    scatters = scatter > 0.0 and error > threshold
    if scatters:
        error = gradient_error(received, wanted, parameter, scale, floor, scatter)
    got = torch.zeros_like(parameter) if received is None else received.to_dense()
    meant = torch.zeros_like(parameter) if wanted is None else wanted.to_dense()
    length = norm(got)
    numbers = {"measured": length, "expected": norm(meant) if error else length, "error": error,
               "threshold": threshold, "gradient_norm": length, "lane": Lane.NATIVE,
               "dtype": dtype_name(subject, parameter.dtype)}  # fmt: skip
    if error <= threshold:
        share = scatter / (rms(to_double(meant)) or 1.0) if scatters else 0.0
        outcome, cause, message = _agreeing(subject, call, name, use, share, before.weighed)
    else:
        explained = explain_gradient(subject, steps, call, name, got, meant, reference)
        outcome, cause, message = _departing(call, name, use, reference, explained)
        message = f"{message}: norm {length:.4g} for {norm(meant):.4g}; {cause}"
        if before.own_draws and use is None and before.groups is None:
            message += f"; the step draws random numbers that the declared loss does not ({listed(before.own_draws)}): "
            message += "where they make its batch or its loss, as mixup does, declare the loss that draws them"
        if before.groups is not None:
            message += f"; {before.groups.text}, and so was the reference evaluated"
        if outcome is Outcome.INCONCLUSIVE:
            message += f"; {OTHER_DRAWS}"
    yield row(subject, "step.gradient", outcome, message, parameter=name, phase=call.phase.name, step=call.step,
              cause=cause, **numbers)  # fmt: skip


def _agreeing(
    subject: Subject, call: Call, name: str, use: BatchUse | None, share: float, weighed: str
) -> tuple[Outcome, str | None, str]:
    """Return outcome, cause and message of a gradient within its threshold.

    ``share`` is how far the loss scatters, ``weighed`` how micro-batches weighed that are the unit.
    """
    where = f"step {call.step}, phase {call.phase.name!r}"
    if use is not None:
        message = f"{name} received the declared loss's gradient on a batch of the step's own ({where}): {use.text}"
        return use.outcome, use.text, message
    if not share <= AGREED:
        return Outcome.INCONCLUSIVE, Cause.NONDETERMINISTIC, (
            f"cannot judge {name}'s gradient ({where}): the loss's own backward scatters by {share:.1e} "
            f"relative from run to run{missing_determinism(subject.device)}"
        )  # fmt: skip
    message = f"{name} received the declared loss's gradient ({where})"
    if share:
        message += f", within what the loss's own backward scatters from run to run ({share:.1e} relative)"
    if weighed:
        message += f"; {weighed}"
    return Outcome.PASS, None, message


def _departing(
    call: Call, name: str, use: BatchUse | None, reference: Reference, explained: tuple[str, bool]
) -> tuple[Outcome, str, str]:
    """Return outcome, cause and the beginning of the message of another gradient than the declared loss's."""
    cause, sure = explained
    if use is not None:
        cause = f"{cause}; {use.text}"
    written = [w for w in call.writes if (w.what, w.parameter) == ("gradient", name)]
    if written:
        sure = True
        cause = "; ".join(f"{w.label} {w.text}" for w in written) + f"; {cause}; {cure(written[0].hook)}"
    other_draws = reference.draws and not (reference.same_draws or reference.replayed or sure)
    where = f"step {call.step}, phase {call.phase.name!r}"
    message = f"{name} received another gradient than the declared loss's ({where})"
    return Outcome.INCONCLUSIVE if other_draws else Outcome.FAIL, cause, message


def explain_gradient(
    subject: Subject, steps: list[TrainingStep], call: Call, name: str, got: torch.Tensor, meant: torch.Tensor,
    reference: Reference,
) -> tuple[str, bool]:  # fmt: skip
    """Say whether scale or direction is off and what would explain it; and whether that explanation is sure."""
    a, b = to_double(got).reshape(-1), to_double(meant).reshape(-1)
    size = float(b @ b)
    if not float(a @ a):
        return "it received zeros", True
    off = _scale(subject, call, float(a @ b) / size) if _parallel(a, b) else "the direction is off"
    for text, leftover in _leftovers(steps, call, name):
        rest = a - b - to_double(leftover).reshape(-1)
        if rms(rest) <= 0.05 * rms(a - b):
            return f"{off}: {text}", True
    for text, gradients in reference.otherwise.items():
        if (gradient := gradients[name]) is not None:
            other = to_double(gradient.to_dense()).reshape(-1)
            if rms(a - other) <= 0.05 * rms(a - b):
                mean = " (a mean of means)" if text == ALIKE.text else ""
                right = _weighing(subject, call).text
                return f"{off}: the micro-batches count {text}{mean} instead of {right}", True
    if size:
        factor = float(a @ b) / size
        if _parallel(a, b):
            cosine = _cosine(a, b)
            astray = max(0.0, 1 - cosine * cosine) ** 0.5
            return _scale(subject, call, factor), a.numel() >= ENOUGH and abs(factor - 1) > BEYOND_DRAWS * astray
    return "the direction is off" if size else "the loss's own gradient is zero", False


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    size = (float(a @ a) * float(b @ b)) ** 0.5
    return float(a @ b) / size if size else 0.0


def _parallel(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two gradients differ in scale only."""
    return abs(_cosine(a, b)) > 1 - PARALLEL


def _scale(subject: Subject, call: Call, factor: float) -> str:
    text = f"the scale is off by a factor {factor:.6g}"
    if factor < 0:
        return text + " (the sign is flipped)"
    if (unclipped := _before_clipping(call)) is not None:
        factor, text = unclipped, f"the scale is off by a factor {unclipped:.6g} before the clipping"
    groups, summed = _groups(call), _weighing(subject, call).total
    count = len(subject.micro_batches(call.phase)) if groups is None else len(groups.batches)
    if count > 1 and summed and abs(factor * count - 1) < 1e-2:
        return text + f": the mean over {count} micro-batches instead of their sum, which this loss is"
    if count > 1 and not summed and abs(factor / count - 1) < 1e-2:
        return text + f": the sum over {count} micro-batches instead of their mean"
    if call.phase.recipe.clip_grad_norm and factor > 1 and unclipped is None:
        return text + ": as if it had not been clipped"
    return text


def _before_clipping(call: Call) -> float | None:
    """Return the norm that torch's clipping saw over the loss's own; None where it saw that, or did not run."""
    note = call.note
    if not isinstance(note, BeforeStep) or not note.clipping or note.reference is None or not note.reference.norm:
        return None
    share = note.clipping[0].norm / note.reference.norm
    return share if share and abs(share - 1) > SAME_NORM else None


def _groups(call: Call) -> Groups | None:
    """Return the groups of its own in which a step took the batch's rows."""
    return call.note.groups if isinstance(call.note, BeforeStep) else None


def _weighing(subject: Subject, call: Call) -> Weighing:
    groups = _groups(call)
    return subject.weighings[call.phase.name] if groups is None else groups.weighing


def _leftovers(steps: list[TrainingStep], call: Call, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Gradients that may have been left in ``p.grad``: of one step or phase, and all since the phase's last step."""
    calls = [c for step in steps for c in step.calls]
    earlier = calls[: next(i for i, c in enumerate(calls) if c is call)]
    since: list[tuple[str, torch.Tensor]] = []
    for one in reversed(earlier):
        own = one.phase.name == call.phase.name
        left = one.received.get(name) if own else _reference(one, name)
        where = f"step {one.step}" if own else f"phase {one.phase.name!r} in step {one.step}"
        if left is not None:
            verb = "was added" if own else "was left over and added"
            yield f"the gradient of {where} {verb} (zero_grad is missing)", left.to_dense()
            since.append((where, left.to_dense()))
        if own:
            break
    if len(since) > 1:
        names = " and of ".join(where for where, _ in since)
        total = torch.stack([left for _, left in since]).sum(0)
        yield f"the gradients of {names} were left over and added (zero_grad is missing)", total


def _reference(call: Call, name: str) -> torch.Tensor | None:
    before = call.note
    return before.reference.gradients.get(name) if isinstance(before, BeforeStep) and before.reference else None
