"""Custom autograd.Functions, each judged alone: which one's backward is not the derivative of its forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from audits.devices import Draws
from audits.gradients.methods.certify import Certifier
from audits.gradients.methods.layouts import Layout, cotangent_sum
from audits.lanes.problem import LaneError, Problem, quiet
from audits.lanes.program import BranchMismatchError, Free
from audits.lanes.tape import Tape
from audits.lanes.watching import FunctionDepth, ModuleStack
from audits.live.subject import Subject
from audits.outcomes import Outcome
from audits.structures import outputs_of

#: Calls judged per Function class: layers of one class share the formula, not always the branch.
CALLS_PER_CLASS = 4


@dataclass(frozen=True)
class FunctionCall:
    """One recorded call of a custom Function.

    Attributes:
        function: the class.
        path: the module it ran in.
        label: the same for people.
        args: its arguments; tensors detached and copied.
        layouts: position of an output -> the layout its gradient arrives in, where that is not the plain one.
    """

    function: type
    path: str
    label: str
    args: tuple[Any, ...]
    layouts: dict[int, Layout] = field(default_factory=dict)


@dataclass(frozen=True)
class WrongFunction:
    """A Function whose backward was found wrong by itself.

    Attributes:
        call: where.
        argument: position of the first argument whose gradient is wrong.
        measured: what its backward gives along the probed direction.
        expected: the derivative of its forward.
    """

    call: FunctionCall
    argument: int
    measured: float
    expected: float

    @property
    def name(self) -> str:
        """The class's name."""
        return function_name(self.call.function)


def function_name(function: type) -> str:
    """Return a Function's name as messages and declarations have it."""
    return function.__qualname__.rpartition("<locals>.")[2]


def declared_custom(subject: Subject) -> set[str]:
    """Return the names of the Functions whose gradient is declared to differ."""
    declared = subject.recipe.expect.get("custom_gradient", ())
    return {declared} if isinstance(declared, str) else set(declared)


def recorded_calls(problem: Problem, stack: ModuleStack) -> list[FunctionCall]:
    """Run the loss forward and backward once and return the calls of custom Functions, in order."""
    calls: list[FunctionCall] = []
    observed = False

    def observe(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal observed
        observed = not cls.__module__.startswith("torch.")
        if not cls.__module__.startswith("torch."):
            copied = tuple(a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args)
            for copy, argument in zip(copied, args, strict=True):
                if isinstance(argument, torch.Tensor) and argument.requires_grad:
                    copy.requires_grad_()
            calls.append(FunctionCall(cls, stack.path, stack.label(stack.path), copied))

    def returned(result: Any) -> None:
        for position, output in enumerate(_outputs(result)) if observed else ():
            if output.requires_grad and not output.is_leaf:
                layouts = calls[-1].layouts
                output.register_hook(lambda g, position=position, layouts=layouts: _note(layouts, position, g))

    problem.before()
    cursor = problem.tape.cursor()
    with quiet(), stack.watching(), Free(cursor, lift=problem.lifts):
        with FunctionDepth().watching(observe, returned):
            loss = problem.loss()
        if calls and loss.requires_grad:
            cursor.by_state_only = True
            torch.autograd.grad(loss, list(problem.tensors.values()), allow_unused=True)
    return calls


def _note(layouts: dict[int, Layout], position: int, gradient: torch.Tensor) -> None:
    found = Layout.of(gradient)
    if found is not None:
        layouts[position] = found


def _outputs(result: Any) -> list[torch.Tensor]:
    return [o for o in outputs_of(result) if _differentiable(o)]


def wrong_functions(problem: Problem, stack: ModuleStack, *, seed: int) -> list[WrongFunction]:
    """Judge every custom Function's backward against its own forward, on the inputs it gets at theta."""
    found: list[WrongFunction] = []
    judged: dict[type, int] = {}
    for call in recorded_calls(problem, stack):
        if judged.get(call.function, 0) >= CALLS_PER_CLASS:
            continue
        judged[call.function] = judged.get(call.function, 0) + 1
        wrong = _judge(call, problem, seed)
        if wrong is not None:
            found.append(wrong)
    return found


def _judge(call: FunctionCall, problem: Problem, seed: int) -> WrongFunction | None:
    tensors = {
        str(i): a for i, a in enumerate(call.args) if isinstance(a, torch.Tensor) and a.requires_grad and a.numel()
    }
    if not tensors:
        return None
    draws = Draws(seed + 41)

    def evaluated() -> list[torch.Tensor]:
        return _outputs(call.function.apply(*call.args))  # type: ignore[attr-defined]

    problem.before()
    try:
        cotangents = [torch.randn(o.shape, **draws.on(o.device), dtype=torch.float64) for o in evaluated()]
    except (RuntimeError, TypeError, ValueError):
        return None

    found = _certified(call, problem, tensors, evaluated, cotangents, seed)
    if found is None and call.layouts:
        laid = [call.layouts[i].lay_out(c) if i in call.layouts else c for i, c in enumerate(cotangents)]
        found = _certified(call, problem, tensors, evaluated, laid, seed)
    return found


def _certified(
    call: FunctionCall,
    problem: Problem,
    tensors: dict[str, torch.Tensor],
    evaluated: Callable[[], list[torch.Tensor]],
    cotangents: list[torch.Tensor],
    seed: int,
) -> WrongFunction | None:
    def loss() -> torch.Tensor:
        total = sum(cotangent_sum(o, c) for o, c in zip(evaluated(), cotangents, strict=True))
        assert isinstance(total, torch.Tensor)
        return torch.real(total) if total.is_complex() else total

    local = Problem(tensors, loss, problem.before, Tape(), problem.lane)
    certifier = Certifier(local, seed=seed, probes=2, detection_limit=1e-3)
    try:
        certifier.run(list(tensors))
    except (LaneError, BranchMismatchError, RuntimeError, TypeError, ValueError):
        return None
    for name, verdict in certifier.verdicts.items():
        if verdict.outcome is Outcome.FAIL:
            measured = float("nan") if verdict.measured is None else verdict.measured
            expected = float("nan") if verdict.expected is None else verdict.expected
            return WrongFunction(call, int(name), measured, expected)
    return None


def _differentiable(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad
