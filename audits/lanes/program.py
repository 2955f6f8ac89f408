"""One pass through the loss under a dispatch mode: recorded at theta, replayed at theta + h v.

A `Program` is the sequence of operators of one forward, each with what is to be done to it: nothing, lift its
arguments, play back its noise, or replay the decision it took at theta. Replaying makes the loss a smooth function of
the parameters (the branch of theta), so that its finite difference is the derivative that autograd claims, at ties
too: every rule writes torch's own convention there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from audits.lanes.emulation import emulation, is_emulated, run
from audits.lanes.kinks.branches import rule_for
from audits.lanes.kinks.rule import COMPARISONS, Rule
from audits.lanes.lifting import OperatorTraits, lift_call, lift_result, traits
from audits.lanes.tape import Tape, TapeCursor, draws
from audits.structures import any_tensor, map_tensors

Action = Callable[[Any, tuple[Any, ...], dict[str, Any], TapeCursor], Any]

#: Operators whose result leaves torch: Python may branch on it, so the order of operators has to be watched.
_LEAVES_TORCH = frozenset({"_local_scalar_dense", "is_nonzero", "equal", "item"})

#: Operators that give no information about a floating input although their result is an integer or a bool.
_NO_DECISION = frozenset({"_local_scalar_dense", "equal", "_version", "sym_size", "sym_numel", "is_pinned"})


_LOSSES = frozenset(
    {"_log_softmax", "nll_loss_forward", "nll_loss2d_forward", "mse_loss", "huber_loss", "smooth_l1_loss",
     "binary_cross_entropy", "binary_cross_entropy_with_logits"}
)  # fmt: skip


class BranchMismatchError(Exception):
    """The replay met another sequence of operators than the recording: Python branched on a value."""


@dataclass(frozen=True)
class Convention:
    """One call whose gradient torch documents to be something else than the derivative.

    Attributes:
        tensor: the leaf it concerns; None where it is everything upstream.
        operator: the operator's name.
        text: what torch does there.
    """

    tensor: torch.Tensor | None
    operator: str
    text: str


@dataclass
class Program:
    """What one forward did, in order."""

    steps: list[tuple[Any, Action | None]] = field(default_factory=list)
    lifted: set[str] = field(default_factory=set)
    frozen: set[str] = field(default_factory=set)
    conventions: list[Convention] = field(default_factory=list)
    leaves_torch: bool = False
    random: bool = False
    #: What stands for the calls of declared custom Functions, in order.
    held: list[Any] = field(default_factory=list)

    @property
    def idle(self) -> bool:
        """Whether a replay changes nothing, so that the mode can be left away."""
        return not self.leaves_torch and not self.held and all(action is None for _, action in self.steps)


class Recording(TorchDispatchMode):
    """Run a forward as it is (lifted, noise taped) and write its program."""

    def __init__(self, program: Program, cursor: TapeCursor, *, lift: bool) -> None:
        super().__init__()
        self.program = program
        self._cursor = cursor
        self._lift_all = lift

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        program, known = self.program, traits(func)
        action: Action | None = None
        lift = self._lift_all or reduces_loss(known, args, kwargs)
        if lift:
            args, kwargs, changed = lift_call(func, args, kwargs)
            if changed:
                program.lifted.add(known.name)
                action = lifted_call
        if draws(func, args, kwargs):
            result = self._cursor.call(func, args, kwargs)
            program.random = True
            action = taped_call
        else:
            rule = rule_for(func)
            bound = known.bind(args, kwargs) if rule is not None else {}
            if rule is not None and rule.applies(bound):
                result, decision = record_rule(rule, bound, known.written, func, args, kwargs)
                program.frozen.add(known.base)
                if emulation(func, args) is not None or is_emulated(f"{known.base}_backward"):
                    program.lifted.add(known.name)
                said = rule.convention(bound, decision) if rule.convention is not None else None
                if said is not None:
                    program.conventions.append(Convention(said[0], known.base, said[1]))
                action = ReplayRule(rule, decision, lift)
            else:
                if emulation(func, args) is not None:
                    program.lifted.add(known.name)
                    action = lifted_call
                result = run(func, args, kwargs)
                if known.base == "embedding_renorm":
                    action = skipped_call  # under no_grad: autograd differentiates at what it left behind
                elif takes_decision(known, args, kwargs, result):
                    program.frozen.add(known.base)
                    action = ReplayResult(result)
        if lift:
            result, changed = lift_result(func, result)
            if changed:
                program.lifted.add(known.name)
                action = action or lifted_call
        program.leaves_torch |= known.base in _LEAVES_TORCH
        program.steps.append((func, action))
        return result


class Replaying(TorchDispatchMode):
    """Run a forward along a recorded program."""

    def __init__(self, program: Program, cursor: TapeCursor) -> None:
        super().__init__()
        self.held = iter(program.held)
        self._steps = program.steps
        self._cursor = cursor
        self._position = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        position = self._position
        if position >= len(self._steps):
            raise BranchMismatchError(f"the forward ran {func} after the recorded program had ended")
        expected, action = self._steps[position]
        if func is not expected:
            raise BranchMismatchError(f"the forward ran {func} where the recording at theta ran {expected}")
        self._position = position + 1
        if action is None:
            return func(*args, **(kwargs or {}))
        return action(func, args, kwargs or {}, self._cursor)

    def finish(self) -> None:
        """Complain when the forward ended early."""
        if self._position != len(self._steps):
            raise BranchMismatchError("the forward ended before the recorded program did")


class Free(TorchDispatchMode):
    """Run forward and backward lifted and with taped noise, branches taken as they come: the analytic gradient."""

    def __init__(self, cursor: TapeCursor, *, lift: bool) -> None:
        super().__init__()
        self._cursor = cursor
        self._lift = lift

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._lift:
            args, kwargs, _ = lift_call(func, args, kwargs)
        result = self._cursor.call(func, args, kwargs) if draws(func, args, kwargs) else run(func, args, kwargs)
        return lift_result(func, result)[0] if self._lift else result


class TapeOnly(Free):
    """Record the native run's noise; nothing is lifted."""

    def __init__(self, tape: Tape) -> None:
        self.cursor = tape.cursor(recording=True)
        super().__init__(self.cursor, lift=False)


def reduces_loss(known: OperatorTraits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the operator ends a loss: a loss function, or a sum or mean over everything.

    In the float32 lane these alone run in float64, or the loss's own rounding would hide what the tensors do.
    """
    if known.base in _LOSSES:
        return True
    bound = known.bind(args, kwargs) if known.base in ("sum", "mean") else {}
    return bool(bound) and not bound.get("dim")


def lifted_call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], cursor: TapeCursor) -> Any:
    """Lift the arguments and a fresh result."""
    args, kwargs, _ = lift_call(func, args, kwargs)
    return lift_result(func, run(func, args, kwargs))[0]


def taped_call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], cursor: TapeCursor) -> Any:
    """Draw, and put the tape's values in place."""
    args, kwargs, _ = lift_call(func, args, kwargs)
    return cursor.call(func, args, kwargs)


def skipped_call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], cursor: TapeCursor) -> Any:
    """Leave an in-place operator out."""
    return args[0]


class ReplayResult:
    """Hand out the integers and masks of theta again."""

    def __init__(self, result: Any) -> None:
        self._result = map_tensors(result, torch.clone)

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], cursor: TapeCursor) -> Any:
        """Return the result of theta."""
        if traits(func).written and isinstance(self._result, torch.Tensor):
            target = kwargs["out"] if "out" in kwargs else args[0]
            target.copy_(self._result)
            return target
        return map_tensors(self._result, torch.clone)


class ReplayRule:
    """Evaluate an operator on the branch it took at theta."""

    def __init__(self, rule: Rule, decision: Any, lift: bool) -> None:
        self._rule = rule
        self._decision = decision
        self._lift = lift

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], cursor: TapeCursor) -> Any:
        """Return the operator's value on the branch of theta."""
        if self._lift:
            args, kwargs, _ = lift_call(func, args, kwargs)
        known = traits(func)
        result = self._rule.replay(self._decision, known.bind(args, kwargs))
        if "out" in kwargs:
            return kwargs["out"].copy_(result)
        return args[0].copy_(result) if 0 in known.written else result


def record_rule(
    rule: Rule, bound: dict[str, Any], written: frozenset[int | str], func: Any, args: Any, kwargs: Any
) -> tuple[Any, Any]:
    """Run an operator and return its result with the decision it took; an in-place one decides on what it had."""
    if 0 in written and "self" in bound:
        bound = {**bound, "self": bound["self"].clone()}
    result = run(func, args, kwargs)
    return result, rule.decide(bound, result)


def takes_decision(known: OperatorTraits, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> bool:
    """Whether nothing but integers or bools comes out of an operator that floats went into."""
    if known.is_view or known.base in _NO_DECISION:
        return False
    if known.written:
        return known.base in COMPARISONS and any_tensor(args, _is_floating)
    if not any_tensor(result, _is_discrete) or any_tensor(result, _is_floating):
        return False
    return any_tensor(args, _is_floating) or any_tensor(tuple(kwargs.values()), _is_floating)


def _is_floating(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _is_discrete(tensor: torch.Tensor) -> bool:
    return not _is_floating(tensor)
