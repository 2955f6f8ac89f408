"""Two real training steps: through the recipe's own step function, or the canonical one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from audits.live.subject import LivePhase, Subject
from audits.structures import map_tensors
from audits.updates.canonical import canonical_step
from audits.updates.judge.whose_step import torch_owned
from audits.updates.received.found import BeforeStep
from audits.updates.received.observed import Observer
from audits.updates.received.search import ReferenceSearch
from audits.updates.record.buffer_watch import BufferWatch
from audits.updates.record.calls import Call, OutsideWrite
from audits.updates.record.context import INITIAL_SCALE, StepContext, build_context, in_training_wrappers
from audits.updates.record.recorder import Recorder
from audits.updates.record.renorms import Renorms
from audits.updates.record.shadow_modules import shadows_of, tensors_of
from audits.updates.record.step_listener import StepListener

#: Training steps that are run: a missing zero_grad, momentum and a schedule show at the second.
STEPS = 2

#: Tries at a sixteenth of the loss scale each before an overflow is given up: 2^16 to below 1.
OVERFLOW_TRIES = 5


@dataclass
class TrainingStep:
    """What one training step did.

    Attributes:
        number: from 1.
        calls: the optimizer steps in order.
        outside: parameters written outside of them.
        buffers: what BatchNorms were fed.
        reference_forwards: train-mode forwards of each BatchNorm in the declared losses alone.
        before: parameters and buffers before the step, where shadows are declared.
        modes: modules that ran in a mode other than the declared one: path -> mode.
        overflowed: the loss scaler met an overflow and skipped a step.
        renormed: parameters whose rows an embedding's ``max_norm`` rescaled in this run's forwards so far.
        changed_batch: tensors of the batch that it changed in place.
        error: what the step function raised.
    """

    number: int
    calls: list[Call] = field(default_factory=list)
    outside: list[OutsideWrite] = field(default_factory=list)
    modes: dict[str, bool] = field(default_factory=dict)
    overflowed: bool = False
    error: Exception | None = None
    changed_batch: tuple[str, ...] = ()
    buffers: BufferWatch | None = None
    reference_forwards: dict[str, int] = field(default_factory=dict)
    before: dict[str, torch.Tensor] = field(default_factory=dict)
    renormed: frozenset[str] = frozenset()

    def of(self, phase: LivePhase) -> list[Call]:
        """Return the calls of one phase."""
        return [call for call in self.calls if call.phase.name == phase.name]

    @property
    def explained(self) -> bool:
        """Whether every optimizer received the gradient of the declared loss on the recipe's batch."""
        notes = [call.note for call in self.calls]
        return all(not isinstance(note, BeforeStep) or note.reference is None or note.agreed for note in notes)


def training_steps(subject: Subject, *, seed: int | None = None, put_back: bool = False) -> Iterator[TrainingStep]:
    """Run `STEPS` training steps from the audit's start and yield what each did, before the next begins.

    The model is left where the last step brought it; `Subject.reset` puts it back. An fp16 step that the loss scaler
    skipped for an overflow is tried again from the start at a smaller scale.

    Args:
        subject: the model under audit.
        seed: instead of the subject's own.
        put_back: give every step the batch as the recipe has it, whatever the step before made of it.
    """
    scale = INITIAL_SCALE
    lend = subject.recipe.precision != "fp16-autocast"  # there nothing is judged before both steps have run

    def begin() -> StepContext:
        subject.given.restore(surely=True)
        subject.reset(seed=seed)
        return build_context(subject, scale=scale)

    if subject.recipe.precision != "fp16-autocast":
        yield from _run(subject, begin, put_back, lend=lend)
        return
    for attempt in range(OVERFLOW_TRIES):
        steps = list(_run(subject, begin, put_back, lend=lend))
        if not any(step.overflowed for step in steps) or attempt == OVERFLOW_TRIES - 1:
            yield from steps
            return
        scale /= 16.0


def _run(
    subject: Subject, begin: Callable[[], StepContext], put_back: bool, *, lend: bool
) -> Iterator[TrainingStep]:  # fmt: skip
    """Run the steps; where one received a gradient that no usual starting point explains, again under an `Observer`.

    What raises only while it is observed is taken as it ran by itself. What was lent (`Lending`) and written to is
    recorded again, with copies.
    """
    may_observe = subject.recipe.step is not None
    observe, yielded = False, 0
    while True:
        runner = _Runner(subject, begin(), Observer(subject) if observe else None, lend=lend)
        again = False
        with runner.recorder.attached():
            for number in range(1, STEPS + 1):
                if put_back:
                    subject.given.restore(surely=True)
                step = runner.run(number)
                if runner.recorder.lending.spoilt:
                    lend, again = False, True
                    break
                if observe and step.error is not None:
                    observe, may_observe, again = False, False, True
                    break
                if number <= yielded:
                    continue
                if may_observe and not observe and step.error is None and not step.explained:
                    observe = again = True
                    break
                yielded = number
                yield step
                if step.error is not None:
                    return
        if not again:
            return


class _Runner:
    """Runs training steps under the recorder and the watch."""

    def __init__(
        self, subject: Subject, context: StepContext, observer: Observer | None, *, lend: bool
    ) -> None:  # fmt: skip
        self.subject = subject
        self.context = context
        self._step_context = in_training_wrappers(subject, context)
        self._listener = StepListener(subject)
        self._buffers = BufferWatch(subject)
        self._observer = observer
        self._step_function = None if subject.recipe.step is None else subject.recipe.step.resolve(role="step")
        self.recorder = Recorder(subject, context.optimizers, self._before_step, owned=torch_owned if lend else None)
        self._renorms = Renorms(subject, self.recorder)
        self._search = ReferenceSearch(
            subject, self.recorder, self._listener, self._buffers, own_step=self._step_function is not None,
            observer=observer,
        )  # fmt: skip

    def run(self, number: int) -> TrainingStep:
        step = TrainingStep(number)
        self.recorder.begin(number)
        self._search.begin()
        scale = self.context.scaler.get_scale()
        step.before = tensors_of(self.subject.model) if shadows_of(self.subject) else {}
        observed = contextlib.nullcontext() if self._observer is None else self._observer.listening()
        with self._listener.listening(), self._buffers.listening(), self._renorms.listening(), torch.enable_grad():
            try:
                if self._step_function is not None:
                    batch = self._batch()
                    with observed:
                        self._step_function(self.subject.model, batch, self._step_context)
                else:
                    canonical_step(self.subject, self.context)
            except Exception as error:
                step.error = error
        self.recorder.end()
        step.calls, step.outside = self.recorder.calls, self.recorder.outside
        step.renormed = frozenset(self._renorms.found)
        step.modes = dict(self._listener.wrong_modes)
        step.buffers, step.reference_forwards = self._buffers, self._buffers.declared
        step.changed_batch = self.subject.given.changed_since(self._search.begun_with)
        step.overflowed = self.context.scaler.get_scale() < scale
        return step

    def _batch(self) -> Any:
        """The whole step's batch, in containers of its own, as the recipe has it: a dict, or a list of dicts."""
        batches = [map_tensors(batch, lambda tensor: tensor) for batch in self.subject.given.batches]
        return batches if isinstance(self.subject.recipe.batch, list) else batches[0]

    def _before_step(self, call: Call) -> BeforeStep:
        """Compute the reference gradient of the phase whose optimizer is about to step."""
        clipping = self._listener.take_clipping()
        # The audit's own step does nothing at its second time that it did not do at its first.
        if self._step_function is None and call.step > 1 and not call.writes:
            return BeforeStep(None, None, clipping)
        not_observed = contextlib.nullcontext() if self._observer is None else self._observer.paused()
        with self._listener.paused(), self._buffers.counting(), self._renorms.paused(), not_observed:
            found = self._search.at(call, clipping, self.context.scaler.get_scale())
            self._search.stepped()
        return found
