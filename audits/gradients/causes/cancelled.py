"""Differences whose gradient cancels although their value does not: a straight-through estimate that was not detached.

With ``q = z + (c - z).detach()`` the gradient of q is that of z, and ``z - q`` (the next stage's residual, a
commitment loss) has none at all: ``d(z - q)/dz = I - I``. Its value is ``z - c`` and depends on z. What is meant is
``z - q.detach()``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from audits.lanes.arithmetic import norm
from audits.lanes.problem import Problem, as_real, quiet
from audits.lanes.program import Free
from audits.lanes.stops import caller
from audits.lanes.watching import FunctionDepth, ModuleStack
from audits.live.subject import Subject

#: Functions of the difference of their first two arguments.
_DIFFERENCES: frozenset[Any] = frozenset(
    {
        torch.sub, torch.subtract, torch.rsub, torch.Tensor.sub, torch.Tensor.subtract, torch.Tensor.__sub__,
        torch.Tensor.__rsub__, torch.Tensor.sub_, torch.Tensor.__isub__, torch.dist, torch.Tensor.dist,
        functional.mse_loss, functional.l1_loss, functional.smooth_l1_loss, functional.huber_loss,
        functional.pairwise_distance,
    }
)  # fmt: skip

#: A gradient that cancels is the sum of two opposite ones, each rounded on its way: some thousand operations leave 32
#: of their roundoffs (the square root of their number); a hundred times that, and far below any gradient that is meant.
CANCELS = 4096

#: The parameters are moved by this share of their root mean square, twice, to see which differences depend on them;
#: a difference that moves by less than a thousandth of what its first argument does is constant.
MOVED, DEPENDS = 1e-6, 1e-3

#: The root mean square of a tensor counts as at least this, as in the probes.
LEAST_RMS = 1e-2

#: Differences looked at.
LIMIT = 128


@dataclass(frozen=True)
class Cancellation:
    """One difference without gradient.

    Attributes:
        label: the module that takes it.
        source: ``file.py:line``.
        tensors: the parameters whose gradient cancels there.
    """

    label: str
    source: str
    tensors: tuple[str, ...]

    def describe(self) -> str:
        """Say what is wrong."""
        return (
            f"the difference taken at {self.source} in {self.label} depends on the parameters and its gradient cancels "
            "exactly, because one side is a straight-through estimate of the other: detach that side where it is "
            "subtracted"
        )


@dataclass(frozen=True)
class _Difference:
    """``first`` is the gradient edge before the call, which may be in place; ``slope`` the partial derivative by it."""

    first: Any
    value: torch.Tensor
    slope: torch.Tensor
    result: torch.Tensor
    label: str
    source: str


class _Differences(TorchFunctionMode):
    def __init__(self, stack: ModuleStack, functions: FunctionDepth) -> None:
        super().__init__()
        self.found: list[_Difference] = []
        self._stack = stack
        self._functions = functions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        sides = args[:2]
        wanted = func in _DIFFERENCES and len(sides) == 2 and all(_has_history(side) for side in sides)
        if not wanted or self._functions.depth or len(self.found) >= LIMIT:
            return func(*args, **kwargs)
        with _disable_current_modes():
            edge, values = get_gradient_edge(args[0]), [side.detach().clone() for side in sides]
            slope = _slope(func, values, args[2:], kwargs)
        result = func(*args, **kwargs)
        if slope is not None and _has_history(result):
            file, line = caller(__file__)
            label = self._stack.label(self._stack.path)
            self.found.append(
                _Difference(edge, values[0], slope, result, label, f"{os.path.basename(file)}:{line}")
            )  # fmt: skip
        return result


def _has_history(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad and value.is_floating_point()


def _slope(func: Any, values: list[torch.Tensor], rest: Any, kwargs: Any) -> torch.Tensor | None:
    """Return the derivative of the result's sum by the first argument alone."""
    leaf = values[0].clone().requires_grad_()
    try:
        with torch.enable_grad():
            return torch.autograd.grad(func(leaf * 1.0, values[1], *rest, **kwargs).sum(), leaf)[0]
    except (RuntimeError, TypeError, ValueError):
        return None


def cancellations(subject: Subject, problem: Problem, names: list[str]) -> list[Cancellation]:
    """Return the differences in the loss that depend on some of the tensors and pass no gradient on to them.

    Args:
        subject: the subject.
        problem: the phase's loss, its tensors at theta.
        names: the tensors of interest.
    """
    here, loss = _differences(subject, problem)
    if not here:
        return []
    used = torch.autograd.grad(loss, [d.result for d in here], retain_graph=True, allow_unused=True)
    suspects = {
        i: tensors for i, d in enumerate(here) if used[i] is not None and (tensors := _cancelling(d, problem, names))
    }
    if not suspects:
        return []
    values = {i: (here[i].value, here[i].result.detach().clone()) for i in suspects}
    moved = [_moved(subject, problem, names, distance) for distance in (MOVED, -MOVED)]
    return [
        Cancellation(here[i].label, here[i].source, tensors)
        for i, tensors in suspects.items()
        if all(len(there) == len(here) and _depends(there[i], *values[i]) for there in moved)
    ]


def _differences(subject: Subject, problem: Problem) -> tuple[list[_Difference], torch.Tensor]:
    stack, functions = ModuleStack(subject.model), FunctionDepth()
    mode = _Differences(stack, functions)
    problem.before()
    with quiet(), Free(problem.tape.cursor(), lift=problem.lifts), stack.watching(), functions.watching(), mode:
        loss = problem.loss()
    return mode.found, loss


def _cancelling(difference: _Difference, problem: Problem, names: list[str]) -> tuple[str, ...]:
    """Return the tensors to which the first side has a gradient and both sides together have none."""
    tensors = [problem.tensors[name] for name in names]
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
    alone = torch.autograd.grad(difference.first, tensors, difference.slope, **options)
    both = torch.autograd.grad(difference.result, tensors, torch.ones_like(difference.result), **options)
    share = CANCELS * problem.roundoff
    return tuple(
        name for name, a, b in zip(names, alone, both, strict=True) if norm(a) > 0 and norm(b) <= share * norm(a)
    )


def _moved(subject: Subject, problem: Problem, names: list[str], distance: float) -> list[_Difference]:
    """Record the differences again with the tensors a little way off."""
    kept = {name: problem.tensors[name].data.clone() for name in names}
    generator = torch.Generator().manual_seed(subject.seed + 23)
    try:
        for name, value in kept.items():
            noise = torch.randn(as_real(value).shape, generator=generator, dtype=torch.float64).to(value.device)
            size = max(norm(value) / max(value.numel(), 1) ** 0.5, LEAST_RMS)
            as_real(problem.tensors[name].data).add_(noise.to(as_real(value).dtype), alpha=distance * size)
        return _differences(subject, problem)[0]
    finally:
        for name, value in kept.items():
            problem.tensors[name].data.copy_(value)


def _depends(there: _Difference, value: torch.Tensor, result: torch.Tensor) -> bool:
    if there.value.shape != value.shape or there.result.shape != result.shape:
        return False
    return norm(there.result.detach() - result) > DEPENDS * norm(there.value - value) > 0
