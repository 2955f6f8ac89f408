"""What an optimizer's step does: gradients and weights before it, weights and state after it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from audits.structures import map_tensors
from audits.subject import LivePhase, Subject

Tensors = dict[str, torch.Tensor]


@dataclass
class Call:
    """One `optimizer.step` of a phase.

    Attributes:
        phase: the phase.
        step: number of the training step, from 1.
        before: the weights of every parameter of the model before it.
        after: the weights of those that it changed.
        gradients: what the optimizer received, unscaled; None where it received none.
        options: the options of each held parameter's group.
        state_after: the optimizer's state by parameter.
        training: mode of every module at its last forward before this call.
        evaluations: for an optimizer that calls its closure: the weights, loss and gradients of every evaluation.
        tensor_rate: whether a learning rate is kept in a tensor, in float32.
        backward: torch's number of the backward inside which it happened; -1 outside of any.
        note: whatever the reference side attached before it.
    """

    phase: LivePhase
    step: int
    before: Tensors
    gradients: dict[str, torch.Tensor | None]
    options: dict[str, dict[str, Any]]
    after: Tensors = field(default_factory=dict)
    state_after: dict[str, dict[str, Any]] = field(default_factory=dict)
    evaluations: list[tuple[Tensors, float, dict[str, torch.Tensor | None]]] = field(default_factory=list)
    note: Any = None
    tensor_rate: bool = False
    backward: int = -1

    @property
    def in_backward(self) -> bool:
        """Whether it happened in a hook of a backward, where some gradients are not there yet."""
        return self.backward != -1

    def moved(self, name: str) -> torch.Tensor:
        """Return the weights after the call."""
        return self.after.get(name, self.before[name])


@dataclass(frozen=True)
class OutsideWrite:
    """A parameter that changed while no optimizer was stepping."""

    parameter: str
    step: int
    before_phase: str | None


#: Called before the optimizer acts: ``(call) -> note``.
BeforeCall = Callable[[Call], Any]


class Recorder:
    """Hooks on the optimizers of all phases; a shadow of the weights tells who wrote what."""

    def __init__(
        self, subject: Subject, optimizers: Mapping[str, torch.optim.Optimizer], before_call: BeforeCall
    ) -> None:
        self._subject = subject
        self._optimizers = optimizers
        self._before_call = before_call
        self._depth = dict.fromkeys(optimizers, 0)
        self._open: dict[str, Call] = {}
        self.shadow: Tensors = {}
        self.at_start: Tensors = {}
        self.step = 0
        self.calls: list[Call] = []
        self.outside: list[OutsideWrite] = []

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Listen while the body runs."""
        handles = []
        for phase in self._subject.phases:
            optimizer = self._optimizers[phase.name]
            handles.append(optimizer.register_step_pre_hook(self._before(phase)))
            handles.append(optimizer.register_step_post_hook(self._after(phase)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def begin(self, step: int) -> None:
        """Start a training step."""
        self.step = step
        self.calls, self.outside = [], []
        self._depth = dict.fromkeys(self._depth, 0)
        self._open = {}
        if not self.shadow:
            self.shadow = snapshot(self._subject.parameters)
        self.at_start = dict(self.shadow)

    def end(self) -> None:
        """Finish a training step: whatever changed since the last call was written outside."""
        self._look_outside(None)

    def _changed(self) -> tuple[Tensors, list[str]]:
        """Bring the shadow up to date; return (the old values, names that differ)."""
        names = [n for n, p in self._subject.parameters.items() if not same_bits(p, self.shadow[n])]
        old = {n: self.shadow[n] for n in names}
        for n in names:
            self.shadow[n] = self._subject.parameters[n].detach().clone()
        return old, names

    def _look_outside(self, before_phase: str | None) -> None:
        _, names = self._changed()
        self.outside += [OutsideWrite(name, self.step, before_phase) for name in names]

    def _before(self, phase: LivePhase) -> Callable[..., Any]:
        def hook(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self._depth[phase.name] += 1
            if self._depth[phase.name] > 1:  # a subclass whose step calls super().step(): the hooks fire twice
                return None
            self._look_outside(phase.name)
            call = Call(
                phase=phase,
                step=self.step,
                before=dict(self.shadow),
                gradients=self._gradients(optimizer),
                options=self._options(optimizer),
                tensor_rate=any(isinstance(group.get("lr"), torch.Tensor) for group in optimizer.param_groups),
                backward=torch._C._current_graph_task_id(),
            )
            self._open[phase.name] = call
            if (earlier := self._earlier_part(call)) is not None:
                call.note = earlier.note
                return None
            # torch hands the optimizer itself as the first argument.
            closure = args[1] if len(args) > 1 else kwargs.get("closure")
            if closure is None:
                call.note = self._before_call(call)
                return None
            wrapped = self._wrap(call, optimizer, closure)
            return ((args[0], wrapped, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": wrapped})

        return hook

    def _after(self, phase: LivePhase) -> Callable[..., None]:
        def hook(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._depth[phase.name] -= 1
            if self._depth[phase.name]:
                return
            call = self._open.pop(phase.name)
            old, names = self._changed()
            call.before |= old
            call.after = {name: self.shadow[name] for name in names}
            call.state_after = self._state(optimizer)
            earlier = self._earlier_part(call)
            if earlier is None:
                self.calls.append(call)
            else:
                _join(earlier, call)

        return hook

    def _earlier_part(self, call: Call) -> Call | None:
        """Return the call that this one goes on with: an optimizer may step as each gradient of a backward arrives."""
        for earlier in reversed(self.calls):
            if call.in_backward and earlier.backward == call.backward and earlier.phase.name == call.phase.name:
                return None if _received(earlier) & _received(call) else earlier
        return None

    def _wrap(self, call: Call, optimizer: torch.optim.Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        """A closure that also tells what it found: such an optimizer has no gradient at its door."""

        def wrapped() -> Any:
            first = not call.evaluations
            loss = closure()
            gradients = self._gradients(optimizer)
            weights = snapshot({n: self._subject.parameters[n] for n in gradients})
            value = loss.detach() if isinstance(loss, torch.Tensor) else loss
            call.evaluations.append((weights, float(value), gradients))
            if first:
                call.gradients = gradients
                call.note = self._before_call(call)
            return loss

        return wrapped

    def _held(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter, dict[str, Any]]]:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = self._subject.name_of(parameter)
                if name is not None:
                    yield name, parameter, group

    def _gradients(self, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor | None]:
        """Clones: SGD(foreach, nesterov) writes into ``p.grad``. Fused optimizers under AMP receive scaled ones."""
        scale = getattr(optimizer, "grad_scale", None)
        found: dict[str, torch.Tensor | None] = {}
        for name, parameter, _ in self._held(optimizer):
            gradient = parameter.grad
            if gradient is not None:
                gradient = gradient.detach().clone()
                gradient = gradient if scale is None else gradient / scale.to(gradient.device)
            found[name] = gradient
        return found

    def _options(self, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
        return {name: plain_options(group) for name, _, group in self._held(optimizer)}

    def _state(self, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
        return {
            name: map_tensors(dict(optimizer.state[parameter]), lambda t: t.detach().clone())
            for name, parameter, _ in self._held(optimizer)
            if optimizer.state.get(parameter)
        }


def _received(call: Call) -> set[str]:
    return {name for name, gradient in call.gradients.items() if gradient is not None}


def _join(earlier: Call, later: Call) -> None:
    """Add to a call what another of the same backward did to parameters that had no gradient yet."""
    for name in _received(later):
        earlier.gradients[name] = later.gradients[name]
        earlier.before[name] = later.before[name]
    earlier.after |= later.after
    earlier.state_after |= later.state_after


def plain_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group's options as plain values; an lr kept in a tensor becomes a number."""
    return {
        key: map_tensors(value, lambda t: t.item() if t.numel() == 1 else t.detach().clone())  # type: ignore[arg-type, return-value]
        for key, value in group.items()
        if key not in ("params", "param_names")
    }


def snapshot(parameters: Mapping[str, torch.Tensor]) -> Tensors:
    """Return clones of the values."""
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same values; NaN equals itself, as nothing wrote there."""
    one, other = one.detach(), other.detach()
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if torch.equal(one, other):
        return True
    missing = one.isnan()
    return bool(missing.any()) and bool(((one == other) | (missing & other.isnan())).all())
