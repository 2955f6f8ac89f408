"""The reference gradient at an optimizer's step: which weights and random numbers the step's own forward began with."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from audits.live.state import ModuleState
from audits.live.subject import LivePhase, Subject
from audits.live.weighing import Weighing
from audits.random_state import RandomState
from audits.updates.received.agreement import added, agrees, distance, scattered
from audits.updates.received.coarseness import gradient_threshold
from audits.updates.received.found import BeforeStep, Found
from audits.updates.received.observed import Forward, Observer, draws_of, starts_seen
from audits.updates.received.reference import Gradients, Reference, Start, reference_gradient
from audits.updates.received.regrouped import groups_of, starts_of
from audits.updates.record.buffer_watch import BufferWatch
from audits.updates.record.calls import Call
from audits.updates.record.recorder import Recorder
from audits.updates.record.shelf import Shelf, held, waiting
from audits.updates.record.step_listener import ClippingCall, StepListener

#: Relative distance at which a reference gradient counts as drawn alike: rounding of the lowest precision.
AGREED = 1e-2

#: Added to the distance of a reference that drew other numbers than the step did.
UNLIKE = 1e6

#: Observed starting points that are tried at one optimizer step: enough for a step that evaluates its loss several
#: times, and a bound on what a wrong step costs.
OBSERVED_TRIES = 12

#: Times that a reference is evaluated again to see how far it scatters.
REPEATS = 2


#: Evaluates the declared loss from a starting point, its backward under autocast or not, micro-batches weighed so.
Trial = Callable[[Start, bool, Weighing], Reference]


class ReferenceSearch:
    """Looks for the point from which the declared loss gives the gradient that an optimizer received.

    Args:
        subject: the model under audit.
        recorder: what the optimizers did so far.
        listener: what is paused while the audit evaluates the model itself.
        buffers: likewise.
        own_step: whether the recipe brings its own step function.
        observer: what was seen of the step, where it is observed.
    """

    def __init__(
        self, subject: Subject, recorder: Recorder, listener: StepListener, buffers: BufferWatch, *, own_step: bool,
        observer: Observer | None = None,
    ) -> None:  # fmt: skip
        self._subject = subject
        self._allowed = functools.partial(gradient_threshold, subject)
        self._recorder = recorder
        self._listener, self._buffers, self._observer = listener, buffers, observer
        self._own_step = own_step
        self._starts: list[Start] = []
        #: The batch's values when the training step began.
        self.begun_with: list[Any] = subject.given.copies()
        self._received: dict[str, Mapping[str, torch.Tensor | None]] = {}
        self._since: list[tuple[str, Gradients]] = []
        self._begun: dict[str, int] = {}
        self._forwards: list[Forward] = []

    def begin(self) -> None:
        """A training step begins here, with the batch as it is."""
        self.begun_with = self._subject.given.copies()
        self._starts = [self._here()]

    def stepped(self) -> None:
        """An optimizer steps here: the next phase's forward may begin here too."""
        self._starts = [self._starts[0], self._here()]

    def _here(self) -> Start:
        return Start(RandomState.now(), ModuleState(self._subject.model))

    def at(self, call: Call, clipping: list[ClippingCall], scale: float) -> BeforeStep:
        """Return the reference gradient of the phase whose optimizer is about to step.

        The likeliest starting points come first, and the first whose gradient agrees with the received one ends the
        search. Where none agrees, one that surely drew the step's own numbers is preferred to the nearest.

        Args:
            call: the optimizer's call; what it received is compared.
            clipping: clipping since the last optimizer step.
            scale: the loss scale in force.
        """
        trial = self._trial(call, clipping, scale)
        self._forwards = [] if self._observer is None else self._observer.take_forwards()
        problem: str | None = None
        found, scatter = Found(), dict[str, float]()
        own_draws: tuple[str, ...] = ()
        try:
            for nearer in self._nearer(call, trial):
                found = nearer
            if found.reference is not None and not found.agreed:
                own_draws = self._own_draws(call.phase)
                self._measure_scatter(call, trial, found, scatter)
        except Exception as error:  # the user's loss runs here: what it raises is no fault of the user's step
            problem = None if found.reference is not None else f"{type(error).__name__}: {error}"
        finally:
            self._buffers.end_trial()
        self._received[call.phase.name] = call.received
        self._begun[call.phase.name] = len(self._since)
        if found.reference is not None:
            self._shelve(found.reference, call, agreed=found.agreed)
            self._since.append((call.phase.name, found.reference.gradients))
        return BeforeStep(
            found.reference, problem, clipping, found.agreed, found.batches, found.weighed, scatter, found.groups,
            own_draws,
        )  # fmt: skip

    def _own_draws(self, phase: LivePhase) -> tuple[str, ...]:
        """Return the functions of torch with which the step drew random numbers and the declared loss does not."""
        if self._observer is None:
            return ()
        of_loss = {str(s[0]) for _, b in self._subject.micro_batches(phase) for s in draws_of(self._subject, phase, b)}
        drawn = dict.fromkeys(str(draw.signature[0]) for draw in self._observer.draws)
        return tuple(name for name in drawn if name not in of_loss and name != "backward")

    def _shelve(self, reference: Reference, call: Call, *, agreed: bool) -> None:
        """Let the reference gradient wait in host memory; what arrived bit for bit is the very tensor that arrived."""
        arrived = call.received
        shelf: Shelf[torch.Tensor | None] = Shelf(self._subject.device)
        for name in list(reference.gradients):
            gradient, other = reference.gradients.pop(name), held(arrived, name)
            if gradient is not None and other is not None and gradient.layout is other.layout is torch.strided:
                gradient = other if torch.equal(gradient.to(other.device), other) else gradient
            shelf.put(name, None if gradient is None else waiting(gradient))
        reference.gradients = shelf
        if agreed:  # nothing is left to be explained by other weights
            reference.otherwise = {}
        for gradients in reference.otherwise.values():
            gradients.update({n: None if g is None else waiting(g) for n, g in gradients.items()})

    def _trial(self, call: Call, clipping: list[ClippingCall], scale: float) -> Trial:
        """Return what evaluates the declared loss from a starting point, the backward under autocast or not."""
        own = clipping[0] if clipping and call.phase.recipe.clip_grad_norm is None else None
        limit = None if own is None else (own.max_norm, own.order)

        def evaluate(start: Start, inside: bool, weighing: Weighing) -> Reference:
            self._buffers.begin_trial()
            return reference_gradient(
                self._subject,
                call.phase,
                start,
                scale=scale,
                clip_norm=limit,
                backward_in_autocast=inside,
                weighing=weighing,
            )

        return evaluate

    def _nearer(self, call: Call, trial: Trial) -> Iterator[Found]:
        """Yield references that are nearer and nearer to the received gradient; one that agrees is the last."""
        received = _compared(call)
        names = [n for n in call.phase.parameters if n in received]
        leftovers = (None, *self._leftovers(call))
        best = Found()
        weighing = self._subject.weighings[call.phase.name]
        tries = itertools.product(self._candidates(call), self._backwards(), (weighing, *weighing.accepted))
        for (start, batches), inside, weighed in tries:
            if best.reference is not None and not best.reference.draws and start.random_only:
                continue  # a loss that draws nothing does not care where the generators stand
            tried = trial(start, inside, weighed)
            if agrees(tried.gradients, received, self._subject.parameters, names, self._allowed):
                unit = f"{weighing.unit}: the micro-batches are the unit, weighed {weighed.text}"
                yield Found(tried, 0.0, agreed=True, batches=batches, weighed=unit if weighing.unit else "")
                return
            if weighed is not weighing:
                continue  # a step that is wrong is wrong against the loss's own
            apart = min(distance(tried.gradients, received, names, left) for left in leftovers)
            if apart > AGREED and not (tried.same_draws or tried.replayed):
                apart += UNLIKE
            if start.batches is not None:
                continue  # another batch than the recipe's is a reference only where it explains everything
            if best.reference is None or apart < best.apart:
                best = Found(tried, apart, batches=batches, start=start, inside=inside)
                yield best
        yield from self._regrouped(call, trial, received, names)

    def _regrouped(
        self, call: Call, trial: Trial, received: Mapping[str, torch.Tensor | None], names: list[str]
    ) -> Iterator[Found]:
        """Yield references on the batch's rows as the step took them: nearer than any on the recipe's, equal or not."""
        if self._observer is None or (groups := groups_of(self._subject, call.phase, self._forwards)) is None:
            return
        starts = starts_of(self._subject, call.phase, groups, self._observer.draws, list(self._plain(call.phase)))
        weighings = (groups.weighing, *groups.weighing.accepted)
        best = Found()
        for start in itertools.islice(starts, OBSERVED_TRIES):
            for inside, weighed in itertools.product(self._backwards(), weighings):
                tried = trial(start, inside, weighed)
                if agrees(tried.gradients, received, self._subject.parameters, names, self._allowed):
                    text = f", weighed {weighed.text}" if len(groups.batches) > 1 else ""
                    yield Found(tried, 0.0, agreed=True, weighed=f"{groups.text}{text}", groups=groups)
                    return
                apart = distance(tried.gradients, received, names, None)
                if weighed is groups.weighing and apart < best.apart:
                    best = Found(tried, apart, start=start, inside=inside, groups=groups)
                    yield best

    def _measure_scatter(self, call: Call, trial: Trial, found: Found, scatter: dict[str, float]) -> None:
        """Evaluate the nearest reference again, and note how far each gradient lies from itself."""
        assert found.reference is not None
        assert found.start is not None
        received = _compared(call)
        weighing = self._subject.weighings[call.phase.name] if found.groups is None else found.groups.weighing
        for _ in range(REPEATS):
            again = trial(found.start, found.inside, weighing)
            names = [n for n in call.phase.parameters if n in received]
            for name, off in scattered(found.reference.gradients, again.gradients, names).items():
                scatter[name] = max(off, scatter.get(name, 0.0))

    def _backwards(self) -> tuple[bool, ...]:
        """Return whether the backward ran under autocast: not in our own step, either way in a user's."""
        return (False, True) if self._own_step and self._subject.recipe.precision != "native" else (False,)

    def _leftovers(self, call: Call) -> Iterator[Mapping[str, torch.Tensor | None]]:
        """Yield gradients that may have been left in this phase's parameters: its own, other phases', and their sum."""
        own = self._received.get(call.phase.name, {})
        others = [g for phase, g in self._since if phase != call.phase.name]
        yield from others
        if own:
            yield own
            since = [g for phase, g in self._since[self._begun.get(call.phase.name, 0) :] if phase != call.phase.name]
            if since:
                yield {name: added([own.get(name), *(g.get(name) for g in since)]) for name in call.phase.parameters}

    def _candidates(self, call: Call) -> Iterator[tuple[Start, tuple[Any, ...] | None]]:
        """Yield (starting point, observed batches), each with the present weights and those of the step's start.

        A step that runs every backward before it steps any optimizer, or steps inside a backward, computed its
        gradients with the weights from the start.
        """
        shadow, at_start = self._recorder.shadow, self._recorder.at_start
        moved = Shelf(shadow.device, {n: at_start.raw(n) for n in at_start if not at_start.same(shadow, n)})
        with_weights = [None, moved] if moved else [None]
        if call.in_backward:
            with_weights.reverse()
        for weights in with_weights:
            for start in self._plain(call.phase):
                yield replace(start, weights=weights), None
        if self._subject.given.changed_since(self.begun_with):  # the loss was given what the step began with
            begun = tuple(batch for _, batch in self._subject.micro_batches(call.phase, uncut=self.begun_with))
            for weights in with_weights:
                for start in self._plain(call.phase):
                    yield replace(start, weights=weights, batches=begun), None
        for start, batches in itertools.islice(starts_seen(self._observer, self._subject, call.phase), OBSERVED_TRIES):
            for weights in with_weights:
                yield replace(start, weights=weights), batches

    def _plain(self, phase: LivePhase) -> Iterator[Start]:
        """Yield where the phase's forward may have started from, likeliest first.

        Where the last optimizer step ended; at the start of the training step, for draws that phases share; after the
        losses of phases that come before.
        """
        yield self._starts[-1]
        yield from (replace(start, random_only=True) for start in self._starts[-2::-1])
        for other in self._subject.phases:
            if other.name == phase.name:
                return
            yield self._after_loss(other)

    def _after_loss(self, phase: LivePhase) -> Start:
        """Return where the random generators stand when a phase's loss was evaluated from the step's start."""
        random, here = RandomState.now(), ModuleState(self._subject.model)
        try:
            self._starts[0].modules.restore()
            self._starts[0].random.restore()
            with torch.enable_grad(), self._subject.autocast():  # a gradient penalty differentiates in its forward
                self._subject.loss(phase)
            return replace(self._starts[0], random=RandomState.now(), random_only=True)
        finally:
            here.restore()
            random.restore()


def _compared(call: Call) -> Mapping[str, torch.Tensor | None]:
    """Return the received gradients that are held against a reference: in a backward, those that are there already."""
    if not call.in_backward:
        return call.received
    return {n: g for n, g in call.received.items() if g is not None}
