"""The custom Functions of one loss: what each got, which of its outputs the loss uses, and what comes back to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from audits.gradients.functions.alone import CALLS_PER_CLASS, FunctionCall, function_name
from audits.lanes.problem import Problem, quiet
from audits.lanes.program import Free
from audits.lanes.watching import FunctionDepth, ModuleStack
from audits.live.subject import Subject
from audits.structures import outputs_of

#: Elements of inputs copied in all (256 MiB in float64); calls beyond are not recorded.
ELEMENTS = 2**25


@dataclass
class RecordedCall:
    """A call and what came of it.

    Attributes:
        call: the Function, where it ran and what it got.
        incoming: position among the outputs -> the gradient that came back to it in the loss's backward.
        leading: positions of the arguments through which its gradient reaches a tensor of the phase.
    """

    call: FunctionCall
    incoming: dict[int, torch.Tensor] = field(default_factory=dict)
    leading: tuple[int, ...] = ()

    def plain_numbers(self) -> list[Any]:
        """Return the floating arguments that ask for no gradient."""
        return [a for i, a in enumerate(self.call.args) if isinstance(a, float) or self.is_plain(i)]

    def is_plain(self, position: int) -> bool:
        """Whether an argument is a floating tensor that asks for no gradient."""
        value = self.call.args[position]
        return _is_float(value) and not value.requires_grad


def record_calls(subject: Subject, problem: Problem, skipped: set[str]) -> list[RecordedCall]:
    """Run the loss forward and backward; return up to four calls of every Function class that matter to the phase.

    Args:
        subject: the subject.
        problem: the phase's loss at its tensors' present values.
        skipped: names of Functions to leave out.
    """
    noting = _Noting(ModuleStack(subject.model), {id(tensor) for tensor in problem.tensors.values()}, skipped)
    problem.before()
    cursor = problem.tape.cursor()
    watching = FunctionDepth().watching(noting.called, noting.returned)
    with quiet(), noting.stack.watching(), Free(cursor, lift=problem.lifts):
        with watching:
            loss = problem.loss()
        if noting.recorded and loss.requires_grad:
            cursor.by_state_only = True
            torch.autograd.grad(loss, list(problem.tensors.values()), allow_unused=True)
    return [made for made in noting.recorded if made.incoming]


class _Noting:
    """Notes calls of Functions as they begin, and keeps those whose result a gradient will flow back through.

    Args:
        stack: which module is under way.
        targets: ids of the tensors that gradients are taken at.
        skipped: names of Functions to leave out.
    """

    def __init__(self, stack: ModuleStack, targets: set[int], skipped: set[str]) -> None:
        self.stack = stack
        self.recorded: list[RecordedCall] = []
        self._targets, self._skipped = targets, skipped
        self._counts: Counter[type] = Counter()
        self._elements = 0
        self._pending: RecordedCall | None = None

    def called(self, cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note a call as it begins."""
        self._pending = None
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        size = sum(a.numel() for a in tensors)
        if cls.__module__.startswith("torch.") or function_name(cls) in self._skipped or kwargs:
            return
        if any(torch._C._functorch.is_functorch_wrapped_tensor(a) for a in tensors):
            return
        if self._counts[cls] >= CALLS_PER_CLASS or self._elements + size > ELEMENTS:
            return
        self._counts[cls] += 1
        self._elements += size
        path = self.stack.path
        self._pending = RecordedCall(FunctionCall(cls, path, self.stack.label(path), tuple(map(_copy, args))))

    def returned(self, result: Any) -> None:
        """Keep the call if a target lies behind its result, and have the gradient that comes in noted."""
        made = self._pending
        if made is None:
            return
        for position, output in enumerate(outputs_of(result)):
            if isinstance(output, torch.Tensor) and output.requires_grad:
                made.leading = made.leading or tuple(_leading(output.grad_fn, made.call, self._targets))
                if made.leading:
                    output.register_hook(lambda g, position=position: made.incoming.update({position: g.detach()}))
        if made.leading:
            self.recorded.append(made)


def _copy(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _leading(node: Any, call: FunctionCall, targets: set[int]) -> Iterator[int]:
    """Yield the positions of the tensor arguments through which the graph reaches one of the targets."""
    if type(node).__name__ != f"{call.function.__name__}Backward":
        return  # a view of what the Function returned, or one of its inputs
    positions = [i for i, a in enumerate(call.args) if isinstance(a, torch.Tensor)]
    for position, (following, _) in zip(positions, node.next_functions, strict=False):
        if following is not None and _is_float(call.args[position]) and _reaches(following, targets):
            yield position


def _reaches(start: Any, targets: set[int]) -> bool:
    stack, seen = [start], {start}
    while stack:
        node = stack.pop()
        if id(getattr(node, "variable", None)) in targets:
            return True
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return False
