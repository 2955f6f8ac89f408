"""Who moved what: isolation of phases, frozen parameters, writes outside the optimizers, finiteness."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from audits.causes import Cause
from audits.globs import matches
from audits.live.ownership import has_exclusive, holders
from audits.live.subject import Subject
from audits.outcomes import Outcome, ResultRow
from audits.recipe.moulds import declared_hook
from audits.updates.findings.registration import ema_shadows
from audits.updates.received.found import BeforeStep
from audits.updates.record.calls import Call, same_bits
from audits.updates.record.hook_listener import cure
from audits.updates.steps import TrainingStep
from audits.updates.update_rows import norm, not_finite, row

#: Gradients of two phases with a cosine below this are said to oppose each other; nothing is judged by it.
OPPOSED = -0.5

_RENORMED = "the forward rescales the rows it uses to max_norm, in place and without gradient, as torch documents"


def isolation_rows(
    subject: Subject, step: TrainingStep, start: Mapping[str, torch.Tensor]
) -> Iterator[ResultRow]:  # fmt: skip
    """Yield rows of one training step.

    Args:
        subject: the model, as the step left it.
        step: what the step did.
        start: the weights before the first training step.
    """
    yield from _frozen(subject, step, start)
    yield from _outside(subject, step)
    yield from _finite(subject, step)
    yield from _isolation(subject, step)


def _frozen(subject: Subject, step: TrainingStep, start: Mapping[str, torch.Tensor]) -> Iterator[ResultRow]:
    held, shadows, declared = holders(subject), ema_shadows(subject), subject.recipe.expect.get("frozen")
    for name, parameter in subject.parameters.items():
        frozen = matches(name, declared)
        if name in shadows or not (frozen or name not in subject.trainable or not held[name]):
            continue
        why = "declared frozen" if frozen else "in no optimizer" if name in subject.trainable else "frozen"
        if same_bits(parameter, start[name]):
            yield row(subject, "update.frozen", Outcome.PASS, f"{name} is {why} and stayed as it was", parameter=name,
                      step=step.number, measured=0.0, expected=0.0)  # fmt: skip
            continue
        written = any(write.parameter == name for write in step.outside)
        if name in step.renormed and not written and not any(name in c.after for c in step.calls):
            message = f"{name} is {why}; {_RENORMED}"
            yield row(subject, "update.frozen", Outcome.PASS, message, parameter=name, step=step.number,
                      cause=Cause.CONVENTION)  # fmt: skip
            continue
        distance = norm(parameter.detach().double() - start[name].double())
        mover = next((c.phase.name for c in step.calls if name in c.after), None)
        message = f"{name} is {why}, but training moved it by {distance:.3g}"
        if mover:
            message += f" (the optimizer of phase {mover!r}{_how(step, mover, name)})"
        else:
            shadow = f"{{{name.partition('.')[0]!r}: {{'source': MODULE, 'decay': NUMBER}}}}"
            message += f" outside of any optimizer; an EMA shadow is declared by expect={{'ema': {shadow}}}"
        yield row(subject, "update.frozen", Outcome.FAIL, message, parameter=name, phase=mover, step=step.number,
                  measured=distance, expected=0.0)  # fmt: skip


def _how(step: TrainingStep, mover: str, name: str) -> str:
    call = next(c for c in step.calls if c.phase.name == mover and name in c.after)
    gradient = call.gradients.get(name)
    if gradient is not None and not bool(gradient.count_nonzero() if not gradient.is_sparse else gradient._nnz()):
        decay = call.options.get(name, {}).get("weight_decay")
        return f": its gradient is zero, weight decay {decay} moves it" if decay else ": its gradient is zero"
    return ": it received a gradient" if gradient is not None else ""


def _outside(subject: Subject, step: TrainingStep) -> Iterator[ResultRow]:
    declared, shadows = subject.recipe.expect.get("writes_outside_step"), ema_shadows(subject)
    written = {(w.parameter, w.hook): w for w in step.outside if w.parameter not in shadows}
    for (name, hook), write in written.items():
        if hook is not None:
            message = f"the {write.kind} {hook} wrote {name} in training step {step.number}, which the rule does not do"
            meant = declared_hook(hook, subject.recipe.expect) or declared is True or matches(name, declared)
            message = f"{message} (declared)" if meant else f"{message}; {cure(hook)}"
            outcome, cause = (Outcome.PASS, None) if meant else (Outcome.FAIL, f"the {write.kind} {hook}")
            yield row(subject, "update.outside-step", outcome, message, parameter=name, step=step.number,
                      phase=write.before_phase, cause=cause)  # fmt: skip
            continue
        allowed = declared is True or matches(name, declared)
        before = (
            f"before the optimizer of phase {write.before_phase!r} stepped"
            if write.before_phase
            else "after the optimizers"
        )
        message = f"{name} was written outside optimizer.step in training step {step.number}, {before}"
        outcome = Outcome.WARN if allowed else Outcome.FAIL
        yield row(subject, "update.outside-step", outcome, message + (" (declared)" if allowed else ""), parameter=name,
                  step=step.number, phase=write.before_phase)  # fmt: skip
    for name in sorted(step.renormed - written.keys()):
        yield row(subject, "update.outside-step", Outcome.PASS, f"{name}: {_RENORMED}", parameter=name,
                  step=step.number, cause=Cause.CONVENTION)  # fmt: skip
    if not written:
        yield row(subject, "update.outside-step", Outcome.PASS, "no parameter was written outside optimizer.step",
                  step=step.number)  # fmt: skip


def _finite(subject: Subject, step: TrainingStep) -> Iterator[ResultRow]:
    for call in step.calls:
        for name in dict.fromkeys(call.options):
            value = call.moved(name)
            bad = not_finite(value)
            message = f"{name} has {bad} of {value.numel()} elements that are not finite after step {step.number}"
            if not bad:
                message = f"{name} is finite after step {step.number}"
            elif not_finite(call.before[name]):
                message += "; it was not finite before either"
            yield row(subject, "update.finite", Outcome.FAIL if bad else Outcome.PASS, message, parameter=name,
                      phase=call.phase.name, step=step.number, measured=float(bad), expected=0.0)  # fmt: skip


def _isolation(subject: Subject, step: TrainingStep) -> Iterator[ResultRow]:
    for call in step.calls:
        foreign = dict(_foreign(subject, step, call))
        for name in call.after:
            if name not in call.options:
                foreign[name] = (
                    Outcome.FAIL,
                    f"phase {call.phase.name!r} moved {name}, which its optimizer does not hold",
                )
        for name, (outcome, message) in foreign.items():
            moved = norm(call.moved(name).detach().double() - call.before[name].double())
            yield row(subject, "update.isolation", outcome, message, phase=call.phase.name, step=step.number,
                      parameter=name, measured=moved, expected=0.0)  # fmt: skip
        if not foreign:
            yield row(subject, "update.isolation", Outcome.PASS, f"{call.phase.name!r} moved only its own parameters",
                      phase=call.phase.name, step=step.number)  # fmt: skip


def _foreign(subject: Subject, step: TrainingStep, call: Call) -> Iterator[tuple[str, tuple[Outcome, str]]]:
    """Yield the parameters that this phase holds and that belong to another phase.

    A parameter belongs to one phase, unless it is declared ``shared``. Of several optimizers that hold it, that of the
    phase which holds nothing else of its own is the owner's; the others reach too far. Where that does not tell (or
    for an assumed recipe), nobody knows who is meant, and both phases are named.
    """
    held, declared = holders(subject), subject.recipe.expect.get("shared")
    assumed = "optimizer" in subject.recipe.assumed
    for name in dict.fromkeys(call.options):
        others = [p for p in held[name] if p != call.phase.name]
        if not others or matches(name, declared):
            continue
        if not has_exclusive(held, call.phase.name) and all(has_exclusive(held, other) for other in others):
            continue  # this phase is the owner: the others are judged
        against = [c for c in step.calls if c.phase.name in others]
        cosine = min((_cosine(call, c, held) for c in against), default=0.0)
        moved = " and moved it" if name in call.after else ""
        message = (
            f"{name} is in the optimizer of phase {call.phase.name!r}{moved}; it belongs to phase {', '.join(others)}"
        )
        if isinstance(call.note, BeforeStep) and call.note.reference is not None and _gradient(call, name) is None:
            message += f": the loss of {call.phase.name!r} does not even depend on it"
        elif cosine < OPPOSED:
            message += f", whose gradient it opposes (cosine {cosine:.2f})"
        message += f"; if both are meant to train it, declare expect={{'shared': [{name!r}]}}"
        yield name, (Outcome.INCONCLUSIVE if assumed else Outcome.FAIL, message)


def _gradient(call: Call, name: str) -> torch.Tensor | None:
    before = call.note
    reference = before.reference if isinstance(before, BeforeStep) else None
    gradient = reference.gradients.get(name) if reference is not None else None
    return gradient if gradient is not None and bool((gradient.to_dense() != 0).any()) else None


def _cosine(one: Call, other: Call, held: dict[str, tuple[str, ...]]) -> float:
    """The angle between two phases' gradients over the parameters that both hold."""
    shared = [n for n in one.options if n in other.options and len(held[n]) > 1]
    product = first = second = 0.0
    for name in shared:
        a, b = _gradient(one, name), _gradient(other, name)
        if a is None or b is None:
            continue
        a, b = a.to_dense().double(), b.to_dense().double()
        product += float((a * b).sum())
        first += float((a * a).sum())
        second += float((b * b).sum())
    return product / (first * second) ** 0.5 if first and second else 0.0
