"""Where in a user's step the declared losses are called, with what, and where random numbers are drawn.

A step may draw numbers before its loss (augmentation, a diffusion's time) and may make another batch of the recipe's.
Both are seen by listening while the step runs: `sys.setprofile` shows each call of a declared loss function and each
forward of the model, a `TorchFunctionMode` each function of torch after which a random generator stands elsewhere.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import CodeType, FrameType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from audits.live.state import ModuleState
from audits.live.subject import LivePhase, Subject
from audits.random_state import RandomState
from audits.structures import map_tensors, tensors_in
from audits.updates.pausing import Pausable
from audits.updates.received.reference import Start, same_random

#: What a function of torch drew, for comparison: its name, and the shapes and dtypes of what it returned.
Signature = tuple[Any, ...]

#: Backwards of both kinds draw alike: a checkpoint that recomputes, a Function that dithers.
_BACKWARDS = ("backward", "grad")


@dataclass(frozen=True)
class LossCall:
    """One call of a phase's declared loss function that may lead to a gradient.

    Attributes:
        phases: names of the phases whose loss it is.
        start: generators and module state when it began.
        batch: the batch it was given, in containers of its own; None where that cannot be told.
    """

    phases: tuple[str, ...]
    start: Start
    batch: Any


@dataclass(frozen=True)
class Draw:
    """One function of torch that drew random numbers."""

    signature: Signature
    start: Start


@dataclass(frozen=True)
class Forward:
    """The tensors that one forward was given, of the model or of a part of it that is called from outside of all."""

    tensors: tuple[torch.Tensor, ...]


#: Every module's call goes through this code.
_MODULE_CALL = nn.Module._call_impl.__code__


class _ForwardListener:
    """Notes the outermost calls of a model's modules that may lead to a gradient; fed with a profiler's events."""

    def __init__(self, model: nn.Module, forwards: list[Forward]) -> None:
        self._modules = {id(module) for module in model.modules()}
        self._forwards = forwards
        self._outermost: FrameType | None = None

    def event(self, frame: FrameType, event: str) -> None:
        if event == "return" and frame is self._outermost:
            self._outermost = None
        elif event == "call" and self._outermost is None and torch.is_grad_enabled():
            given = frame.f_locals
            if id(given["self"]) not in self._modules:
                return
            self._outermost = frame
            tensors = tensors_in((given["args"], given["kwargs"]))
            self._forwards.append(Forward(tuple(t.detach().clone() for _, t in tensors)))


class Observer(Pausable):
    """Collects loss calls, forwards and draws of a training step.

    Args:
        subject: the model under audit.
    """

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._codes = _loss_codes(subject)
        self.calls: list[LossCall] = []
        self.draws: list[Draw] = []
        self._forwards: list[Forward] = []
        self._listener = _ForwardListener(subject.model, self._forwards)

    def take_forwards(self) -> list[Forward]:
        """Return the model's forwards since this was last asked, or since the step began."""
        taken = self._forwards[:]
        self._forwards.clear()
        return taken

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Listen while the body runs; what an earlier step did is forgotten."""
        self.calls, self.draws = [], []
        self._forwards.clear()
        self._listener = _ForwardListener(self._subject.model, self._forwards)
        before = sys.getprofile()
        with _DrawListener(self.draws, self._start, lambda: self.is_paused):
            sys.setprofile(self._profile)
            try:
                yield
            finally:
                sys.setprofile(before)

    def _start(self, random: RandomState | None = None) -> Start:
        return Start(random or RandomState.now(), ModuleState(self._subject.model))

    def _profile(self, frame: FrameType, event: str, _: Any) -> None:
        if frame.f_code is _MODULE_CALL and not self.is_paused:
            with self.paused(), torch._C.DisableTorchFunction():
                self._listener.event(frame, event)
        if event != "call" or self.is_paused or frame.f_code not in self._codes or not torch.is_grad_enabled():
            return
        with self.paused(), torch._C.DisableTorchFunction():
            code, known = frame.f_code, self._codes[frame.f_code]
            given = frame.f_locals.get(code.co_varnames[known.batch]) if code.co_argcount > known.batch else None
            batch = None if given is None else map_tensors(given, lambda t: t.detach().clone())
            self.calls.append(LossCall(known.phases, self._start(), batch))


class _DrawListener(TorchFunctionMode):
    """Notes every function of torch that leaves a generator elsewhere than it found it."""

    def __init__(self, draws: list[Draw], start: Callable[[RandomState], Start], paused: Callable[[], bool]) -> None:
        super().__init__()
        self._draws, self._start, self._is_paused = draws, start, paused

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._is_paused():
            return function(*args, **(kwargs or {}))
        before = RandomState.now()
        result = function(*args, **(kwargs or {}))
        if not same_random(before, RandomState.now()):
            self._draws.append(Draw(_signature(function, result), self._start(before)))
        return result


def _signature(function: Any, result: Any) -> Signature:
    name = getattr(function, "__name__", str(function))
    if name in _BACKWARDS:
        return ("backward",)
    return (name, *((tuple(t.shape), t.dtype) for _, t in tensors_in(result)))


def draws_of(subject: Subject, phase: LivePhase, batch: Any) -> list[Signature]:
    """Return what the declared loss draws by functions of torch on a batch, forward only; leaves no trace."""
    here, generators = ModuleState(subject.model), RandomState.now()
    draws: list[Draw] = []
    try:
        listener = _DrawListener(draws, lambda random: Start(random, here), lambda: False)
        with torch.enable_grad(), subject.autocast(), listener:
            phase.call_loss(subject.model, batch)
    finally:
        here.restore()
        generators.restore()
    return [draw.signature for draw in draws]


def forwards_of(subject: Subject, phase: LivePhase, batch: Any) -> int:
    """Return how many forwards of the model the declared loss makes on a batch; leaves no trace."""
    here, generators = ModuleState(subject.model), RandomState.now()
    forwards: list[Forward] = []
    listener = _ForwardListener(subject.model, forwards)
    before = sys.getprofile()

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if frame.f_code is _MODULE_CALL:
            listener.event(frame, event)

    try:
        with torch.enable_grad(), subject.autocast():
            sys.setprofile(profile)
            phase.call_loss(subject.model, batch)
    finally:
        sys.setprofile(before)
        here.restore()
        generators.restore()
    return len(forwards)


def matches(wanted: Sequence[Sequence[Signature]], draws: Sequence[Draw]) -> Iterator[tuple[Start, ...]]:
    """Yield where each micro-batch's draws may have begun: its signatures in a row, one micro-batch after the other.

    Args:
        wanted: signatures of each micro-batch's draws; none of them empty.
        draws: what the step drew.
    """
    found = [draw.signature for draw in draws]

    def begins(signatures: Sequence[Signature], at: int) -> int | None:
        last = len(found) - len(signatures)
        return next((i for i in range(at, last + 1) if found[i : i + len(signatures)] == list(signatures)), None)

    first = begins(wanted[0], 0)
    while first is not None:
        places, after = [first], first + len(wanted[0])
        for signatures in wanted[1:]:
            place = begins(signatures, after)
            if place is None:
                return
            places.append(place)
            after = place + len(signatures)
        yield tuple(draws[place].start for place in places)
        first = begins(wanted[0], first + 1)


def starts_seen(
    observer: Observer | None, subject: Subject, phase: LivePhase
) -> Iterator[tuple[Start, tuple[Any, ...] | None]]:
    """Yield the starting points that were seen: calls of the declared loss, and draws like the loss's own."""
    if observer is None:
        return
    count = len(subject.micro_batches(phase))
    calls = [call for call in observer.calls if phase.name in call.phases]
    for first in range(len(calls) - count, -1, -1):
        window = calls[first : first + count]
        starts, passed = tuple(c.start for c in window), tuple(c.batch for c in window)
        seen = None if any(batch is None for batch in passed) else passed
        yield _from(starts), seen
        if seen is not None:
            yield replace(_from(starts), batches=seen), seen
    wanted = [draws_of(subject, phase, batch) for _, batch in subject.micro_batches(phase)]
    if all(wanted):
        places = list(matches(wanted, observer.draws))
        yield from ((_from(starts), None) for starts in reversed(places))


def _from(starts: Sequence[Start]) -> Start:
    """Return the start of the first micro-batch that knows where the others' generators stood."""
    return replace(starts[0], pieces=tuple(start.random for start in starts))


@dataclass(frozen=True)
class _LossCode:
    """Whose loss a piece of code is, and which of its arguments is the batch."""

    phases: tuple[str, ...]
    batch: int


def _loss_codes(subject: Subject) -> dict[CodeType, _LossCode]:
    """Return the code of each declared loss function ``(model, batch)``, and the phases it belongs to.

    The step calls none of the others: a name of `torch.nn.functional` or a loss module has other arguments.
    """
    found: dict[CodeType, _LossCode] = {}
    for phase in subject.phases:
        if phase.loss_function is not phase.recipe.loss.resolve(role="loss"):
            continue
        function: Any = inspect.unwrap(phase.loss_function)
        place = 1
        while isinstance(function, functools.partial):
            place += len(function.args)
            function = inspect.unwrap(function.func)
        if not isinstance(function, (FunctionType, MethodType)):
            function = getattr(function, "__call__", None)  # noqa: B004 - an object's own code is wanted
        if isinstance(function, MethodType):
            place += 1
        code = getattr(getattr(function, "__func__", function), "__code__", None)
        if isinstance(code, CodeType):
            others = found[code].phases if code in found else ()
            found[code] = _LossCode((*others, phase.name), place)
    return found
