"""Functions whose gradient is declared to differ: the loss is judged with that gradient taken as it is.

A straight-through rounding, a surrogate spike or a gradient reversal is no derivative of its forward, and what is
upstream of it has no derivative to be held against. It has one where the Function is replaced by the linear map that
its backward is the transpose of: ``y(x) = y0 + J (x - x0)``, with ``J' u = backward(u)`` at theta. Autograd's gradient
of that loss is the very one that the declared backward makes, so differences of it judge all but the declaration.
``J v`` is the derivative of ``<backward(u), v>`` in u.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from audits.causes import Cause
from audits.gradients.functions.alone import declared_custom, function_name
from audits.gradients.graph import LossGraph
from audits.gradients.verdicts import Verdict, describe
from audits.lanes.problem import Problem, quiet
from audits.lanes.program import Free, Program, Recording, Replaying
from audits.lanes.tape import Tape
from audits.lanes.watching import ModuleStack, applied, standing_in
from audits.live.subject import Subject
from audits.outcomes import Outcome
from audits.structures import outputs_of
from audits.wording import listed

#: ``<backward(u), w>`` and ``<u, J w>`` are the same number but for rounding where the backward is linear.
LINEAR = 1e-9


def held_as_declared(subject: Subject, problem: Problem) -> tuple[Problem, dict[str, type]]:
    """Return the problem with the declared Functions replaced around theta, and these by where they are called.

    The problem as it is, and no Function, where nothing is declared, where a declared backward is not linear or cannot
    be differentiated, or where calls of it are not seen.

    Args:
        subject: the subject.
        problem: its tensors at theta.
    """
    declared = declared_custom(subject)
    if not declared:
        return problem, {}
    stack = ModuleStack(subject.model)
    replace = _StandIns(declared, stack, lift=problem.lifts)

    def loss() -> torch.Tensor:
        with stack.watching(), standing_in(replace):
            return problem.loss()

    program = Program()
    problem.before()
    try:
        with quiet(), Recording(program, problem.tape.cursor(recording=True), lift=problem.lifts):
            loss()
    except Exception:  # the model's own code: the loss is judged as it is, which says what it raises
        return problem, {}
    if not program.held or None in program.held:
        return problem, {}
    return dataclasses.replace(problem, loss=loss), replace.labels


def say_what_is_held(problem: Problem, verdicts: Mapping[str, Verdict], held: Mapping[str, type]) -> dict[str, Verdict]:
    """Return the verdicts; those upstream of a Function that was taken as declared say so."""
    if not held:
        return dict(verdicts)
    graph = LossGraph(problem)
    upstream = {label: graph.upstream_of(function) for label, function in held.items()}
    said = dict(verdicts)
    for name, verdict in verdicts.items():
        labels = [label for label, names in upstream.items() if name in names]
        if labels and verdict.outcome is Outcome.PASS:
            message = f"{verdict.message or describe(name, verdict)}; the declared gradient of {listed(labels)} is "
            cause = Cause.DECLARED_CUSTOM_GRADIENT.at(", ".join(labels))
            said[name] = dataclasses.replace(verdict, message=message + "taken as it is, and not judged", cause=cause)
    return said


class _StandIns:
    """Replaces the results of declared Functions while a forward is recorded or replayed.

    Args:
        declared: their names, or paths of the modules that they run in.
        stack: where in the model an evaluation is.
        lift: whether what is low inside a Function is lifted.
    """

    def __init__(self, declared: set[str], stack: ModuleStack, *, lift: bool) -> None:
        self._declared, self._stack, self._lift = declared, stack, lift
        self.labels: dict[str, type] = {}

    def __call__(self, function: type, args: tuple[Any, ...], result: Any) -> Any:
        """Return what stands for the result."""
        name = function_name(function)
        if not self._declared & {name, self._stack.path} or not any(_moves(o) for o in outputs_of(result)):
            return result
        modes = reversed(_get_current_dispatch_mode_stack())
        mode = next((m for m in modes if isinstance(m, (Recording, Replaying))), None)
        if mode is None:  # autograd's own gradient: by the backward as it is
            return result
        if isinstance(mode, Recording):
            held = _Held.of(function, args, result, lift=self._lift)
            mode.program.held.append(held)
            self.labels.setdefault(f"{name} in {self._stack.label(self._stack.path)}", function)
        else:
            held = next(mode.held, None)
        if held is None:
            return result
        values = iter(held.values(args))
        with torch._C.DisableTorchFunction():  # no value that a stop-gradient holds back
            replaced = [applied(_Placed, (o, next(values))) if _moves(o) else o for o in outputs_of(result)]
        return replaced[0] if isinstance(result, torch.Tensor) else type(result)(replaced)


class _Placed(torch.autograd.Function):
    """A value in the place of another one, whose gradient goes on to that."""

    @staticmethod
    def forward(ctx: Any, replaced: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return gradient, None


@dataclasses.dataclass
class _Alone:
    """One call made again by itself: its leaves, its outputs, and a gradient and a way drawn for each.

    Attributes:
        leaves: by position among the arguments.
        outputs: those that carry a gradient.
        incoming: a random gradient for each output.
        ways: a random way for each leaf.
    """

    leaves: dict[int, torch.Tensor]
    outputs: list[torch.Tensor]
    incoming: list[torch.Tensor]
    ways: dict[int, torch.Tensor]

    def back(self, incoming: Sequence[torch.Tensor], *, twice: bool = False) -> dict[int, torch.Tensor]:
        """Return what the backward makes of gradients, by leaf; ``twice`` for what is differentiated again."""
        leaves = list(self.leaves.values())
        found = torch.autograd.grad(
            self.outputs, leaves, incoming, retain_graph=True, create_graph=twice, allow_unused=True
        )
        return {i: g for i, g in zip(self.leaves, found, strict=True) if g is not None}


class _Transposed:
    """The map by differentiating the backward in its gradient."""

    def __init__(self, alone: _Alone) -> None:
        self._none = [torch.zeros_like(o).requires_grad_() for o in alone.outputs]
        self._gradients = alone.back(self._none, twice=True)
        self._constant = {i: g for i, g in self._gradients.items() if not g.requires_grad}

    def holds(self, alone: _Alone) -> bool:
        """Whether ``<backward(u), w> = <u, J w>`` for one u and w, and nothing comes of no gradient."""
        if any(bool((g != 0).any()) for g in self._constant.values()):
            return False
        pairs = [(g, alone.ways[i]) for i, g in alone.back(alone.incoming).items()]
        back, size = sum(float((g * w).sum()) for g, w in pairs), sum(float((g * w).abs().sum()) for g, w in pairs)
        ahead = sum(float((u * t).sum()) for u, t in zip(alone.incoming, self.moved(alone.ways), strict=True))
        return abs(back - ahead) <= LINEAR * size

    def moved(self, ways: Mapping[int, torch.Tensor]) -> list[torch.Tensor]:
        """Return ``J v`` for each output."""
        used = [i for i in self._gradients if i not in self._constant]
        if not used:
            return [torch.zeros_like(u) for u in self._none]
        gradients, along = [self._gradients[i] for i in used], [ways[i] for i in used]
        found = torch.autograd.grad(gradients, self._none, along, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(u) if t is None else t for t, u in zip(found, self._none, strict=True)]


class _Elementwise:
    """The map of a backward that multiplies its gradient, each element by a number: found without its derivative."""

    def __init__(self, alone: _Alone) -> None:
        (output,) = alone.outputs
        ((self._position, self._slope),) = alone.back([torch.ones_like(output)]).items()

    def holds(self, alone: _Alone) -> bool:
        """Whether the backward is the product for one gradient, and nothing comes of no gradient."""
        (incoming,) = alone.incoming
        if self._slope.shape != incoming.shape:
            return False
        (found,) = alone.back([incoming]).values()
        (nothing,) = alone.back([torch.zeros_like(incoming)]).values()
        product = self._slope * incoming
        return not bool(nothing.any()) and bool(((found - product).abs() <= LINEAR * product.abs()).all())

    def moved(self, ways: Mapping[int, torch.Tensor]) -> list[torch.Tensor]:
        """Return ``J v``."""
        return [self._slope * ways[self._position]]


class _Held:
    """One call's linear map around theta."""

    def __init__(
        self, start: dict[int, torch.Tensor], base: list[torch.Tensor], tangent: _Transposed | _Elementwise
    ) -> None:
        self._start, self._base, self._tangent = start, base, tangent

    @classmethod
    def of(cls, function: type, args: tuple[Any, ...], result: Any, *, lift: bool) -> _Held | None:
        """Return a call's map; None where its backward is not seen to be linear, or the call cannot be made again."""
        generator = torch.Generator().manual_seed(0)
        with _aside():
            base = [o.detach().clone() for o in outputs_of(result) if _moves(o)]
            incoming = [_drawn(o, generator) for o in base]
            ways = {i: _drawn(a, generator) for i, a in enumerate(args) if _moves(a)}
        for kind in (_Transposed, _Elementwise):
            refused = contextlib.suppress(RuntimeError, NotImplementedError, TypeError, ValueError)
            with refused, _aside(), torch.enable_grad(), Free(Tape().cursor(strict=True), lift=lift):
                given = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]
                leaves = {i: given[i].requires_grad_() for i in ways}
                outputs = [o for o in outputs_of(applied(function, given)) if _moves(o)]
                alone = _Alone(leaves, outputs, incoming, ways)
                tangent = kind(alone)
                if tangent.holds(alone):
                    return cls({i: leaf.detach() for i, leaf in leaves.items()}, base, tangent)
        return None

    def values(self, args: tuple[Any, ...]) -> list[torch.Tensor]:
        """Return the outputs at other arguments: ``y0 + J (x - x0)``."""
        with _aside():
            moved = self._tangent.moved({i: args[i].detach() - start for i, start in self._start.items()})
            return [base + step for base, step in zip(self._base, moved, strict=True)]


@contextlib.contextmanager
def _aside() -> Iterator[None]:
    """Work that no mode sees, of those that record a forward or look for stop-gradients in it."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        yield


def _drawn(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.device, like.dtype)


def _moves(value: Any) -> bool:
    """Whether an argument or output carries a gradient."""
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.requires_grad
