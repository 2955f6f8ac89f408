"""Custom autograd.Functions, each judged alone: which one's backward is not the derivative of its forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from audits.devices import Draws
from audits.gradients.certify import Certifier
from audits.lanes.problem import LaneError, Problem, quiet
from audits.lanes.program import BranchMismatchError, Free
from audits.lanes.tape import Tape
from audits.lanes.watching import FunctionDepth, ModuleStack
from audits.outcomes import Outcome
from audits.subject import Subject

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
    """

    function: type
    path: str
    label: str
    args: tuple[Any, ...]


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
    """Evaluate the loss once and return the calls of custom Functions, in order."""
    calls: list[FunctionCall] = []

    def observe(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not cls.__module__.startswith("torch."):
            copied = tuple(a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args)
            for copy, argument in zip(copied, args, strict=True):
                if isinstance(argument, torch.Tensor) and argument.requires_grad:
                    copy.requires_grad_()
            calls.append(FunctionCall(cls, stack.path, stack.label(stack.path), copied))

    problem.before()
    with quiet(), stack.watching(), FunctionDepth().watching(observe), Free(problem.tape.cursor(), lift=problem.lifts):
        problem.loss()
    return calls


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

    def outputs_of() -> list[torch.Tensor]:
        result = call.function.apply(*call.args)  # type: ignore[attr-defined]
        return [o for o in (result if isinstance(result, (tuple, list)) else [result]) if _differentiable(o)]

    problem.before()
    try:
        cotangents = [torch.randn(o.shape, **draws.on(o.device), dtype=torch.float64) for o in outputs_of()]
    except (RuntimeError, TypeError, ValueError):
        return None

    def loss() -> torch.Tensor:
        outputs = outputs_of()
        total = sum((o * c).sum() for o, c in zip(outputs, cotangents, strict=True))
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
