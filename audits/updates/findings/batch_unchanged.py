"""The batch is an input: a step that changes it in place gives the next step other data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from audits.causes import Cause
from audits.checks.step import BATCH_UNCHANGED
from audits.live.state import ModuleState
from audits.live.subject import Subject
from audits.outcomes import Outcome, ResultRow
from audits.random_state import RandomState
from audits.updates.received.agreement import Gradients, agrees
from audits.updates.received.coarseness import gradient_threshold
from audits.updates.received.reference import Start, reference_gradient
from audits.updates.steps import TrainingStep
from audits.updates.update_rows import row

_TO_DO = "To do: work on a copy (batch['x'].clone(), x + 1 in the place of x += 1)"


def batch_rows(
    subject: Subject, steps: Sequence[TrainingStep], restored: Callable[[], Sequence[TrainingStep]]
) -> Iterator[ResultRow]:
    """Yield ``step.batch-unchanged``: the batch after the first step is the batch before it.

    Args:
        subject: the model under audit.
        steps: its training steps; the second was given what the first had left.
        restored: runs the steps once more, the second with the batch as the recipe has it.
    """
    if not subject.settings.wants_check(BATCH_UNCHANGED.name) or any(step.error is not None for step in steps):
        return
    own = subject.recipe.step is not None
    changed = steps[0].changed_batch if own and steps else subject.written_batch
    if not changed:
        message = f"the {'step' if own else 'loss'} leaves the batch as it was"
        yield row(subject, BATCH_UNCHANGED.name, Outcome.PASS, message)
        return
    names = ", ".join(repr(path) for path in changed)
    who = "training step 1" if own else "the loss"
    depends = _differs(subject, steps, restored()) if own else _loss_differs(subject)
    message = f"{who} changes {names} of the batch in place"
    if depends:
        message += f", and the gradient of {depends} in the next step on the same batch depends on it. {_TO_DO}"
        yield row(subject, BATCH_UNCHANGED.name, Outcome.FAIL, message, cause=Cause.BATCH_CHANGED)
    else:
        message += f"; the next step on the same batch has the same gradient all the same. {_TO_DO}"
        yield row(subject, BATCH_UNCHANGED.name, Outcome.WARN, message, cause=Cause.BATCH_CHANGED)


def _differs(subject: Subject, steps: Sequence[TrainingStep], again: Sequence[TrainingStep]) -> str:
    """Return a parameter whose gradient in the second step is another one where the batch was put back before."""
    for one, other in zip(steps[1:], again[1:], strict=False):
        for call, twin in zip(one.calls, other.calls, strict=False):
            if (name := _apart(subject, call.received, twin.received)) is not None:
                return name
    return ""


def _loss_differs(subject: Subject) -> str:
    """Return a parameter whose gradient of a declared loss is another one on the batch that the loss leaves behind."""
    for phase in subject.phases:
        subject.reset()
        start = Start(RandomState.now(), ModuleState(subject.model))
        left = [batch for _, batch in subject.micro_batches(phase, subject.left_by_loss(phase))]
        first = reference_gradient(subject, phase, start)
        later = reference_gradient(subject, phase, Start(start.random, start.modules, batches=tuple(left)))
        if (name := _apart(subject, first.gradients, later.gradients)) is not None:
            return name
    return ""


def _apart(subject: Subject, one: Gradients, other: Gradients) -> str | None:
    for name in one:
        if name not in subject.parameters or name not in other:
            continue
        if not agrees(one, other, subject.parameters, [name], lambda dtype: gradient_threshold(subject, dtype)):
            return name
    return None
