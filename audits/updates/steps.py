"""Two real training steps: through the recipe's own step function, or the canonical one."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from audits.state import ModuleState, RandomState
from audits.structures import map_tensors
from audits.subject import LivePhase, Subject
from audits.updates.buffers import BufferWatch, declared_shadows, tensors_of
from audits.updates.context import INITIAL_SCALE, StepContext, build_context
from audits.updates.recorder import Call, OutsideWrite, Recorder
from audits.updates.reference import Gradients, Reference, Start, reference_gradient
from audits.updates.watch import ClippingCall, Watch

#: Training steps that are run: a missing zero_grad, momentum and a schedule show at the second.
STEPS = 2

#: Relative distance at which a reference gradient counts as drawn alike: rounding of the lowest precision.
AGREED = 1e-2

#: Added to the distance of a reference that drew other numbers than the step did.
UNLIKE = 1e6

#: Tries at a sixteenth of the loss scale each before an overflow is given up: 2^16 to below 1.
OVERFLOW_TRIES = 5


@dataclass
class TrainingStep:
    """What one training step did.

    Attributes:
        number: from 1.
        calls: the optimizer steps in order.
        outside: parameters written outside of them.
        clipping: calls of torch's norm clipping, by the phase whose optimizer stepped next.
        buffers: what BatchNorms were fed.
        reference_forwards: train-mode forwards of each BatchNorm in the declared losses alone.
        before: parameters and buffers before the step, where shadows are declared.
        modes: modules that ran in a mode other than the declared one: path -> mode.
        overflowed: the loss scaler met an overflow and skipped a step.
        error: what the step function raised.
    """

    number: int
    calls: list[Call] = field(default_factory=list)
    outside: list[OutsideWrite] = field(default_factory=list)
    clipping: dict[str, list[ClippingCall]] = field(default_factory=dict)
    modes: dict[str, bool] = field(default_factory=dict)
    overflowed: bool = False
    error: Exception | None = None
    buffers: BufferWatch | None = None
    reference_forwards: dict[str, int] = field(default_factory=dict)
    before: dict[str, torch.Tensor] = field(default_factory=dict)

    def of(self, phase: LivePhase) -> list[Call]:
        """Return the calls of one phase."""
        return [call for call in self.calls if call.phase.name == phase.name]


@dataclass(frozen=True)
class Door:
    """What was computed at an optimizer's door."""

    reference: Reference | None
    error: str | None
    clipping: list[ClippingCall]


def training_steps(
    subject: Subject, *, seed: int | None = None, with_state: bool = True, reference: bool = True
) -> Iterator[TrainingStep]:
    """Run `STEPS` training steps from the audit's start and yield what each did, before the next begins.

    The model is left where the last step brought it; `Subject.reset` puts it back. An fp16 step that the loss scaler
    skipped for an overflow is tried again from the start at a smaller scale.
    """
    scale = INITIAL_SCALE
    for attempt in range(OVERFLOW_TRIES):
        subject.reset(seed=seed)
        context = build_context(subject, with_state=with_state, scale=scale)
        if not context.scaler.is_enabled():
            yield from _run(subject, context, reference)
            return
        steps = list(_run(subject, context, reference))
        if not any(step.overflowed for step in steps) or attempt == OVERFLOW_TRIES - 1:
            yield from steps
            return
        scale /= 16.0


def _run(subject: Subject, context: StepContext, reference: bool) -> Iterator[TrainingStep]:
    runner = _Runner(subject, context, reference)
    with runner.recorder.attached():
        for number in range(1, STEPS + 1):
            step = runner.run(number)
            yield step
            if step.error is not None:
                return


class _Runner:
    """Runs training steps under the recorder and the watch."""

    def __init__(self, subject: Subject, context: StepContext, reference: bool) -> None:
        self.subject = subject
        self.context = context
        self._reference = reference
        self._starts: list[Start] = []
        self._watch = Watch(subject)
        self._buffers = BufferWatch(subject)
        self.recorder = Recorder(subject, context.optimizers, self._at_the_door)
        self._step_function = None if subject.recipe.step is None else subject.recipe.step.resolve(role="step")

    def run(self, number: int) -> TrainingStep:
        step = TrainingStep(number)
        self.recorder.begin(number)
        self._starts = [self._start()]
        scale = self.context.scaler.get_scale()
        step.before = tensors_of(self.subject.model) if declared_shadows(self.subject) else {}
        with self._watch.listening(), self._buffers.listening(), torch.enable_grad():
            try:
                if self._step_function is not None:
                    self._step_function(self.subject.model, self._batch(), self.context)
                else:
                    canonical_step(self.subject, self.context)
            except Exception as error:
                step.error = error
        self.recorder.end()
        step.calls, step.outside = self.recorder.calls, self.recorder.outside
        step.modes = dict(self._watch.wrong_modes)
        step.clipping = self._watch.clipping
        step.buffers, step.reference_forwards = self._buffers, self._buffers.declared
        step.overflowed = self.context.scaler.get_scale() < scale
        return step

    def _batch(self) -> Any:
        """The whole step's batch, in containers of its own, as the recipe has it: a dict, or a list of dicts."""
        batches = [map_tensors(batch, lambda tensor: tensor) for batch in self.subject._batches]
        return batches if isinstance(self.subject.recipe.batch, list) else batches[0]

    def _start(self) -> Start:
        return Start(RandomState.now(), ModuleState(self.subject.model))

    def _at_the_door(self, call: Call) -> Door:
        """Compute the reference gradient of the phase whose optimizer is about to step."""
        clipping = self._watch.take_clipping(call.phase.name)
        # The audit's own step does nothing at its second time that it did not do at its first.
        if not self._reference or (self._step_function is None and call.step > 1):
            return Door(None, None, clipping)
        found: Reference | None = None
        nearest, problem = float("inf"), None
        limit = clipping[0].max_norm if clipping and call.phase.recipe.clip_grad_norm is None else None
        with self._watch.paused(), self._buffers.counting():
            for start, inside in itertools.product(self._candidates(call.phase), self._backwards()):
                self._buffers.begin_trial()
                try:
                    tried = reference_gradient(
                        self.subject,
                        call.phase,
                        start,
                        scale=self.context.scaler.get_scale(),
                        clip_norm=limit,
                        backward_in_autocast=inside,
                    )
                except Exception as error:
                    problem = f"{type(error).__name__}: {error}"
                    break
                distance = min(apart(tried.gradients, call.gradients, left) for left in ({}, *self._leftovers(call)))
                if distance > AGREED:  # what drew the same numbers is compared, even where it is not the nearest
                    distance += 0.0 if tried.same_draws else UNLIKE
                if found is None or distance < nearest:
                    found, nearest = tried, distance
                if inside is not self._backwards()[-1] and nearest:
                    continue
                if nearest <= AGREED or (not tried.draws and not self.recorder.calls):
                    break
            self._buffers.end_trial()
            self._starts = [self._starts[0], self._start()]
        return Door(found, problem, clipping)

    def _backwards(self) -> tuple[bool, ...]:
        """Return whether the backward ran under autocast: not in our own step, either way in a user's."""
        own = self._step_function is None
        return (False,) if own or self.subject.recipe.precision == "native" else (False, True)

    def _leftovers(self, call: Call) -> Iterator[Gradients]:
        """Yield gradients of other phases that may have been left in this phase's parameters."""
        for earlier in self.recorder.calls:
            door = earlier.note
            if earlier.phase.name != call.phase.name and isinstance(door, Door) and door.reference is not None:
                yield door.reference.gradients

    def _candidates(self, phase: LivePhase) -> Iterator[Start]:
        """Yield where the phase's forward may have started from, likeliest first.

        Where the last optimizer step ended; at the start of the training step, for draws that phases share; after the
        losses of phases that come before. The same with the weights from the start of the training step, for a step
        that runs every backward before it steps any optimizer.
        """
        starts = [*reversed(self._starts)]
        yield from starts
        for other in self.subject.phases:
            if other.name == phase.name:
                break
            starts.append(self._after_loss(other))
            yield starts[-1]
        if self.recorder.calls:
            moved = {n: v for n, v in self.recorder.at_start.items() if v is not self.recorder.shadow[n]}
            for start in starts:
                yield Start(start.random, start.modules, moved)

    def _after_loss(self, phase: LivePhase) -> Start:
        """Return where the random generators stand when a phase's loss was evaluated from the step's start."""
        door, here = RandomState.now(), ModuleState(self.subject.model)
        try:
            self._starts[0].modules.restore()
            self._starts[0].random.restore()
            with torch.no_grad(), self.subject.autocast():
                self.subject.loss(phase)
            return Start(RandomState.now(), self._starts[0].modules)
        finally:
            here.restore()
            door.restore()


def apart(one: Gradients, other: Gradients, left: Gradients) -> float:
    """Return the relative distance of ``one`` plus what was left to ``other``; 0 when they agree to the bit."""
    difference = size = 0.0
    for name, gradient in other.items():
        wanted = one.get(name)
        if gradient is None and wanted is None:
            continue
        present = gradient if gradient is not None else wanted
        assert present is not None
        nothing = torch.zeros((), device=present.device)
        a = nothing if gradient is None else gradient.to_dense()
        b = nothing if wanted is None else wanted.to_dense()
        if (more := left.get(name)) is not None:
            b = b + more.to_dense()
        if a.shape == b.shape and torch.equal(a, b.to(a.dtype)):
            continue
        difference += float((a.double() - b.double()).square().sum())
        size += float(b.double().square().sum())
    return (difference / size) ** 0.5 if size else (float("inf") if difference else 0.0)


def canonical_step(subject: Subject, context: StepContext) -> None:
    """Do for each phase: zero_grad, forward and backward per micro-batch, unscale, clip, step, scheduler."""
    for phase in subject.phases:
        optimizer, scaler = context.optimizers[phase.name], context.scaler
        evaluate = functools.partial(_evaluate, subject, context, phase)
        if needs_closure(optimizer):
            optimizer.step(evaluate)  # type: ignore[arg-type]  # torch takes tensors too
        else:
            evaluate()
            scaler.unscale_(optimizer) if scaler.is_enabled() else None
            if phase.recipe.clip_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(list(phase.parameters.values()), phase.recipe.clip_grad_norm)
            scaler.step(optimizer)
        if phase.name in context.schedulers:
            context.schedulers[phase.name].step()
    context.scaler.update()


def _evaluate(subject: Subject, context: StepContext, phase: LivePhase) -> torch.Tensor:
    """Clear the gradients, run every micro-batch forward and backward, and return the loss."""
    context.optimizers[phase.name].zero_grad()
    total: torch.Tensor | None = None
    for weight, batch in subject.micro_batches(phase):
        with subject.autocast():
            loss = phase.call_loss(subject.model, batch)
        loss = loss if weight == 1.0 else loss * weight
        context.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None
    return total


def needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's ``step`` cannot do without a closure, as LBFGS's."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty
