"""What an optimizer's step does: gradients and weights before it, weights and state after it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from audits.live.subject import LivePhase, Subject
from audits.recipe.moulds import declared_hook
from audits.structures import map_tensors
from audits.updates.record.calls import Call, OutsideWrite, join, plain_options, received, same_bits, snapshot
from audits.updates.record.hook_listener import (
    POST,
    WRAPPED,
    HookWrite,
    gradient_writes,
    state_writes,
    watched_hooks,
)
from audits.updates.record.lent import Lending, lendable
from audits.updates.record.shelf import Shelf, snapshot_of, waiting

#: What each parameter was, and what it received.
Weights = Shelf[torch.Tensor]
Received = Shelf[torch.Tensor | None]

#: Hooks of the recorder before a step: whatever is beside them is the user's.
OURS = 2

#: Called before the optimizer acts: ``(call) -> note``.
BeforeCall = Callable[[Call], Any]


class Recorder:
    """Hooks on the optimizers of all phases; a shadow of the weights tells who wrote what."""

    def __init__(
        self, subject: Subject, optimizers: Mapping[str, torch.optim.Optimizer], before_call: BeforeCall, *,
        owned: Callable[[LivePhase], bool] | None = None,
    ) -> None:  # fmt: skip
        self._subject = subject
        self.lending = Lending(subject, owned)
        self._optimizers = optimizers
        self._before_call = before_call
        self._depth = dict.fromkeys(optimizers, 0)
        self._open: dict[str, Call] = {}
        self._handed: dict[str, Received] = {}
        self._writes: dict[str, list[HookWrite]] = {}
        self._within: dict[str, tuple[str, str]] = {}
        self._begun = dict.fromkeys(optimizers, 0)
        self._inner: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor, tuple[str, str]]]] = {
            n: {} for n in optimizers
        }
        self.shadow: Weights = Shelf(subject.device)
        self.at_start: Weights = Shelf(subject.device)
        self.step = 0
        self.calls: list[Call] = []
        self.outside: list[OutsideWrite] = []

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Listen while the body runs."""
        with contextlib.ExitStack() as stack:
            for phase in self._subject.phases:
                optimizer = self._optimizers[phase.name]
                stack.enter_context(watched_hooks(optimizer, functools.partial(self._around, phase, optimizer)))
                first = optimizer.register_step_pre_hook(self._entering(phase))
                _to_front(optimizer._optimizer_step_pre_hooks, first.id)
                done = optimizer.register_step_post_hook(self._after(phase))
                _to_front(optimizer._optimizer_step_post_hooks, done.id)
                others = (optimizer.register_step_pre_hook(self._before(phase)),
                          optimizer.register_step_post_hook(self._leaving(phase)))  # fmt: skip
                for handle in (first, done, *others):
                    stack.callback(handle.remove)
            yield

    def begin(self, step: int) -> None:
        """Start a training step."""
        self.step = step
        self.calls, self.outside = [], []
        self._depth = dict.fromkeys(self._depth, 0)
        self._open, self._handed, self._within = {}, {}, {}
        self.lending.take_back_gradients()
        self.lending.take_back_states()
        if not self.shadow:
            for name, parameter in self._subject.parameters.items():
                held = self._subject.held_value(name)  # the model was just put back to it: no second copy
                same = same_bits(parameter, held.to(parameter.device))
                self.shadow.put(name, held if same else snapshot_of(parameter))
        self.at_start = self.shadow.copy()

    def end(self) -> None:
        """Finish a training step: whatever changed since the last call was written outside."""
        self._look_outside(None)
        self.lending.look()

    def _changed(self) -> tuple[Weights, list[str]]:
        """Bring the shadow up to date; return (the old values, names that differ)."""
        names = [n for n, p in self._subject.parameters.items() if not same_bits(p, self.shadow[n])]
        old: Weights = Shelf(self._subject.device)
        for n in names:
            old.put(n, self.shadow.raw(n))
            self.shadow.put(n, snapshot_of(self._subject.parameters[n]))
        return old, names

    def _shadow_of(self, names: list[str]) -> Weights:
        return Shelf(self._subject.device, {name: self.shadow.raw(name) for name in names})

    def _look_outside(self, before_phase: str | None) -> None:
        _, names = self._changed()
        kind, hook = self._within.get(before_phase or "", (None, None))
        self.outside += [OutsideWrite(name, self.step, before_phase, hook, kind) for name in names]

    def _entering(self, phase: LivePhase) -> Callable[..., None]:
        """Ours comes first: what changed until now was written by the training step."""

        def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            self._depth[phase.name] += 1
            if self._depth[phase.name] == 1:  # a subclass whose step calls super().step(): the hooks fire twice
                self._look_outside(phase.name)
                if len(optimizer._optimizer_step_pre_hooks) > OURS and phase.name not in self._handed:
                    self._handed[phase.name] = self._gradients(optimizer)

        return hook

    def _leaving(self, phase: LivePhase) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self._depth[phase.name] -= 1

        return hook

    @contextlib.contextmanager
    def _around(self, phase: LivePhase, optimizer: torch.optim.Optimizer, kind: str, hook: str) -> Iterator[None]:
        """See what one of the user's hooks writes, or a ``step`` that was set on the instance."""
        name, wraps = phase.name, kind == WRAPPED
        nested = self._depth[name] > 1 or (wraps and self._depth[name] > 0)
        if not nested:
            self._look_outside(name)
        gradients, state, begun = self._gradients(optimizer), self._state(optimizer), self._begun[name]
        if wraps and not nested:
            self._handed[name] = gradients
            self._within[name] = (kind, hook)
        before = Shelf(self._subject.device, {n: snapshot_of(p) for n, p in self._subject.parameters.items()}) if (
            nested
        ) else self.shadow.copy()  # fmt: skip
        options = self._options(optimizer)
        yield
        writes = self._writes.setdefault(name, [])
        if not wraps:
            if kind != POST:
                writes += gradient_writes(kind, hook, gradients, self._gradients(optimizer))
            writes += state_writes(kind, hook, state, self._state(optimizer))
            for parameter, old in before.items() if nested and kind == POST else ():
                new = self._subject.parameters[parameter]
                if not same_bits(new, old):
                    self._inner[name][parameter] = (old, new.detach().clone(), (kind, hook))
        elif not nested and begun == self._begun[name]:
            self._took_its_place(phase, optimizer, before, gradients, options)
        if not nested:
            around = self._within.get(name, (kind, hook))
            self._within[name] = (kind, hook)
            self._look_outside(name)
            self._within[name] = around
            if wraps or around == (kind, hook):
                del self._within[name]

    def _took_its_place(
        self, phase: LivePhase, optimizer: torch.optim.Optimizer, before: Weights,
        gradients: Received, options: dict[str, dict[str, Any]],
    ) -> None:  # fmt: skip
        """Record a step set on the instance that never reached that of the class: it is the rule."""
        if phase.recipe.optimizer.kept is not None:
            phase.recipe.optimizer.kept.replaced = True
        _, names = self._changed()
        after = self._shadow_of(names)
        call = Call(phase=phase, step=self.step, before=before, gradients=gradients, options=options, after=after,
                    handed=gradients, phase_expect=self._subject.recipe.expect)  # fmt: skip
        call.state_after = self._state(optimizer)
        parameters = self._subject.parameters
        with torch.no_grad():
            for name in names:
                parameters[name].copy_(before[name])
            try:
                call.note = self._before_call(call)
            finally:
                for name in names:
                    parameters[name].copy_(after[name])
        self._handed.pop(phase.name, None)
        self.calls.append(call)

    def _before(self, phase: LivePhase) -> Callable[..., Any]:
        def hook(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._depth[phase.name] > 1:
                return None
            self._look_outside(phase.name)
            self._begun[phase.name] += 1
            self._inner[phase.name] = {}
            self.lending.take_back_states(phase.name)
            # torch hands the optimizer itself as the first argument.
            closure = args[1] if len(args) > 1 else kwargs.get("closure")
            call = Call(
                phase=phase,
                step=self.step,
                before=self.shadow.copy(),
                gradients={},
                options=self._options(optimizer),
                tensor_rate=any(isinstance(group.get("lr"), torch.Tensor) for group in optimizer.param_groups),
                backward=torch._C._current_graph_task_id(),
                phase_expect=self._subject.recipe.expect,
            )
            lend = closure is None and self.lending.gradients(call, optimizer)
            call.gradients = self._gradients(optimizer, call if lend else None)
            call.handed = self._handed.pop(phase.name, call.gradients)
            call.writes = self._writes.pop(phase.name, [])
            if phase.name in self._within:
                known = {w.parameter for w in call.writes if w.what == "gradient"}
                kind, name = self._within[phase.name]
                wrapper = gradient_writes(kind, name, call.handed, call.gradients)
                call.writes += [write for write in wrapper if write.parameter not in known]
            if any(w.what == "state" and declared_hook(w.hook, call.phase_expect) for w in call.writes):
                call.state_before = self._state(optimizer)
            self._open[phase.name] = call
            if (earlier := self._earlier_part(call)) is not None:
                call.note = earlier.note
                return None
            if closure is None:
                call.note = self._before_call(call)
                return None
            wrapped = self._wrap(call, optimizer, closure)
            return ((args[0], wrapped, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": wrapped})

        return hook

    def _after(self, phase: LivePhase) -> Callable[..., None]:
        def hook(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._depth[phase.name] > 1:
                return
            call = self._open.pop(phase.name)
            old, names = self._changed()
            assert isinstance(call.before, Shelf)
            call.before.add(old)
            call.after = self._shadow_of(names)
            for name, (moved, written, (kind, by)) in self._inner[phase.name].items():
                if same_bits(self.shadow[name], written):  # a step inside the step ended it: the hook wrote after that
                    call.after[name] = moved  # type: ignore[index]
                    self.outside.append(OutsideWrite(name, self.step, phase.name, by, kind))
            self.lending.look()  # a kernel that writes into the gradients
            lend = self.lending.state(call, optimizer)
            call.state_after = self._state(optimizer, lend=lend)
            if lend:
                self.lending.lend_state(call)
            earlier = self._earlier_part(call)
            if earlier is None:
                self.calls.append(call)
            else:
                join(earlier, call)

        return hook

    def _earlier_part(self, call: Call) -> Call | None:
        """Return the call that this one goes on with: an optimizer may step as each gradient of a backward arrives."""
        for earlier in reversed(self.calls):
            if call.in_backward and earlier.backward == call.backward and earlier.phase.name == call.phase.name:
                return None if received(earlier) & received(call) else earlier
        return None

    def _wrap(self, call: Call, optimizer: torch.optim.Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        """A closure that also tells what it found: such an optimizer has no gradient at its door."""

        def wrapped() -> Any:
            first = not call.evaluations
            loss = closure()
            gradients = self._gradients(optimizer)
            weights = snapshot({n: self._subject.parameters[n] for n in gradients})
            value = loss.detach() if isinstance(loss, torch.Tensor) else loss
            # Lightning's manual optimization hands over a closure that does nothing and returns nothing
            call.evaluations.append((weights, float("nan") if value is None else float(value), gradients))
            if first:
                call.gradients = call.handed = gradients
                call.note = self._before_call(call)
            return loss

        return wrapped

    def _held(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter, dict[str, Any]]]:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = self._subject.name_of(parameter)
                if name is not None:
                    yield name, parameter, group

    def _gradients(self, optimizer: torch.optim.Optimizer, lent_to: Call | None = None) -> Received:
        """Copies: SGD(foreach, nesterov) writes into ``p.grad``. Fused optimizers under AMP receive scaled ones.

        Of a sparse gradient the rows that occur twice are added up here, once: another order of that sum is another
        gradient, which a float64 copy of the weights shows.
        """
        scale = getattr(optimizer, "grad_scale", None)
        found: Received = Shelf(self._subject.device)
        for name, parameter, _ in self._held(optimizer):
            gradient = parameter.grad
            if gradient is not None:
                gradient = gradient.detach().coalesce() if gradient.is_sparse else gradient.detach()
                if lent_to is not None and scale is None and lendable(gradient):
                    self.lending.lend_gradient(lent_to, name, gradient)
                else:
                    whole = gradient if scale is None else gradient / scale.to(gradient.device)
                    gradient = snapshot_of(whole) if whole is gradient else waiting(whole)
            found.put(name, gradient)
        return found

    def _options(self, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
        return {name: plain_options(group) for name, _, group in self._held(optimizer)}

    def _state(self, optimizer: torch.optim.Optimizer, *, lend: bool = False) -> Shelf[dict[str, Any]]:
        found: Shelf[dict[str, Any]] = Shelf(self._subject.device)
        for name, parameter, _ in self._held(optimizer):
            if state := optimizer.state.get(parameter):
                found.put(name, map_tensors(dict(state), torch.Tensor.detach if lend else snapshot_of))
        return found


def _to_front(hooks: Any, key: int) -> None:
    hooks.move_to_end(key, last=False)
