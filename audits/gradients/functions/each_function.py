"""Every custom autograd.Function judged once by itself, off the batch's special case.

A loss passes while a Function's mistake meets values that hide it: uniform weights, a zero-initialised head, an
incoming gradient that is the same everywhere. So each Function is evaluated alone, on the inputs it gets when what is
uniform or zero in batch, parameters and buffers is varied, with incoming gradients of the loss's own sizes in another
order and with other signs, and its backward held against differences of its forward.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from audits.causes import Cause
from audits.checks.gradient import FINITE_DIFFERENCE
from audits.gradients.functions.alone import declared_custom, function_name
from audits.gradients.functions.function_record import RecordedCall, record_calls
from audits.gradients.graph import LossGraph
from audits.gradients.methods.certify import Certifier
from audits.gradients.methods.domains import domain_of, is_special, varied
from audits.gradients.methods.layouts import Layout, cotangent_sum
from audits.gradients.methods.variation import off_special_case
from audits.gradients.verdicts import Verdict, number
from audits.lanes.problem import Problem
from audits.lanes.tape import Tape
from audits.live.subject import LivePhase, Subject
from audits.outcomes import Outcome, ResultRow
from audits.structures import outputs_of
from audits.wording import listed

#: Incoming gradients keep the loss's own sizes but for factors from this one to 1: a Function that clips the gradient
#: (by value or by norm) clips no more than it does in training.
LEAST_FACTOR = 0.5

#: What an incoming gradient that is zero everywhere is replaced by (a zero-initialised head).
SMALL_GRADIENT = 1e-2

#: The parameters are moved by this share of themselves to see which plain arguments follow them.
MOVED = 1e-3

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Judged:
    """One call's worst argument: what was judged, and what had been varied for it."""

    made: RecordedCall
    argument: int
    verdict: Verdict
    varied: tuple[str, ...]


def judge_each_function(
    subject: Subject, phase: LivePhase, problem: Problem, verdicts: Mapping[str, Verdict]
) -> list[ResultRow]:
    """Return a failing row for every custom Function that is wrong by itself and that no tensor's verdict names yet.

    What cannot be judged alone (it raises there, or its plain arguments follow the parameters, so that its backward may
    account for them) gets no row: the loss's own gradient has been judged with it.

    Args:
        subject: the subject.
        phase: the phase the problem belongs to.
        problem: the phase's loss, its tensors at theta.
        verdicts: what was found about the tensors.
    """
    failing = {n for n, v in verdicts.items() if v.outcome is Outcome.FAIL and _is_formula(v.cause)}
    found = _all_wrong(subject, problem, declared_custom(subject))
    graph = LossGraph(problem) if found and failing else None
    rows: dict[str, ResultRow] = {}
    for wrong in found:
        function = wrong.made.call.function
        if graph is not None and failing & graph.upstream_of(function):
            continue  # what is upstream of it fails for a wrong formula already
        cause = Cause.WRONG_BACKWARD.at(f"{function_name(function)} in {wrong.made.call.label}")
        rows.setdefault(cause, _row(subject, phase, problem, wrong, cause))
    return list(rows.values())


_FORMULAS = frozenset({Cause.WRONG_GRADIENT, Cause.WRONG_TOWARDS_LOSS, Cause.WRONG_FEW_ELEMENTS,
                       Cause.ONE_WRONG_ELEMENT, Cause.WRONG_BACKWARD, Cause.BACKWARD_HOOK})  # fmt: skip


def _is_formula(cause: str | None) -> bool:
    """Whether a tensor fails for a wrong backward, rather than for a value that is held constant."""
    return Cause.read(cause)[0] in _FORMULAS


def _all_wrong(subject: Subject, problem: Problem, skipped: set[str]) -> list[_Judged]:
    """Return the calls whose backward is wrong by itself."""
    here = record_calls(subject, problem, skipped)
    if not here:
        return []
    judged: dict[int, _Judged] = {}

    def judge(made: RecordedCall, position: int, names: tuple[str, ...]) -> None:
        seed = subject.seed + position
        found = _judge(made, problem, seed)
        if found is None:
            return
        judged[position] = _Judged(made, *found, names)
        replaced = _other_constant(made, seed)
        if found[1].outcome is Outcome.PASS and replaced is not None:
            argument, call = replaced
            found = _judge(call, problem, seed)
            if found is not None and found[1].outcome is Outcome.FAIL:
                judged[position] = _Judged(call, *found, (f"argument {argument}",))

    dependent = _dependent(subject, problem, skipped, here)
    with off_special_case(problem, seed=subject.seed) as (other, names):
        there = _recorded(subject, other, skipped) if names else []
        if [made.call.function for made in there] == [made.call.function for made in here]:
            dependent |= _dependent(subject, other, skipped, there)
            for i, made in enumerate(there):
                if i not in dependent:
                    judge(made, i, tuple(names))
    for i, made in enumerate(here):
        if i not in judged and i not in dependent:
            judge(made, i, ())
    return [found for found in judged.values() if found.verdict.outcome is Outcome.FAIL]


def _other_constant(made: RecordedCall, seed: int) -> tuple[int, RecordedCall] | None:
    """Return the call with its one constant plain argument varied: weights that neither batch nor model hold.

    None where another plain number may have been computed from it: the two would no longer fit.
    """
    plain = [i for i, a in enumerate(made.call.args) if isinstance(a, float) or made.is_plain(i)]
    candidates = [i for i in plain if made.is_plain(i) and is_special(made.call.args[i]) and made.call.args[i].any()]
    if len(candidates) != 1:
        return None
    argument = candidates[0]
    tensor = made.call.args[argument]
    total = float(tensor.sum())
    for i in plain:
        value = made.call.args[i]
        if i != argument and (isinstance(value, torch.Tensor) or math.isclose(value * total, 1) or value == total):
            return None
    args = list(made.call.args)
    args[argument] = varied(tensor, torch.Generator().manual_seed(seed + 67), data=True)
    return argument, replace(made, call=replace(made.call, args=tuple(args)))


def _recorded(subject: Subject, problem: Problem, skipped: set[str]) -> list[RecordedCall]:
    try:
        return record_calls(subject, problem, skipped)
    except Exception as error:  # the model's own code, on values it may not be made for
        _log.debug("the loss cannot be evaluated off the batch's special case: %s", error)
        return []


def _dependent(subject: Subject, problem: Problem, skipped: set[str], here: Sequence[RecordedCall]) -> set[int]:
    """Return the calls with a plain number among the arguments that follows the parameters, as a detached mean does."""
    if not any(made.plain_numbers() for made in here):
        return set()
    kept = {name: tensor.detach().clone() for name, tensor in problem.tensors.items()}
    generator = torch.Generator().manual_seed(subject.seed + 59)
    try:
        for tensor in problem.tensors.values():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device, tensor.dtype)
            tensor.data.add_(noise * tensor.detach().abs().clamp_min(MOVED), alpha=MOVED)
        there = _recorded(subject, problem, skipped)
    finally:
        for name, value in kept.items():
            problem.tensors[name].data.copy_(value)
    if [made.call.function for made in there] != [made.call.function for made in here]:
        return set(range(len(here)))
    pairs = enumerate(zip(here, there, strict=True))
    return {i for i, (a, b) in pairs if not _same(a.plain_numbers(), b.plain_numbers())}


def _same(first: list[Any], second: list[Any]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
        for a, b in zip(first, second, strict=True)
    )


def _judge(made: RecordedCall, problem: Problem, seed: int) -> tuple[int, Verdict] | None:
    """Return the worst argument and its verdict; None when the call cannot be judged by itself."""
    generator = torch.Generator().manual_seed(seed + 61)
    cotangents = {i: _incoming(gradient, generator) for i, gradient in made.incoming.items()}
    found = _certified(made, problem, seed, cotangents)
    layouts = {i: layout for i, g in made.incoming.items() if (layout := Layout.of(g)) is not None}
    if found is None or found[1].outcome is not Outcome.PASS or not layouts:
        return found
    laid = {i: layouts[i].lay_out(c) if i in layouts else c for i, c in cotangents.items()}
    other = _certified(made, problem, seed, laid)
    return other if other is not None and other[1].outcome is Outcome.FAIL else found


def _certified(
    made: RecordedCall, problem: Problem, seed: int, cotangents: Mapping[int, torch.Tensor]
) -> tuple[int, Verdict] | None:
    """Judge a call with some incoming gradients."""
    call = made.call
    domains = {i: domain_of(call.args[i].detach()) for i in made.leading}
    leaves = {i: domain.free.detach().clone().requires_grad_() for i, domain in domains.items()}

    def argument(position: int, value: Any) -> Any:
        if position in leaves:
            return domains[position].valid(leaves[position])
        return value.clone() if isinstance(value, torch.Tensor) else value  # the Function may write into it

    def loss() -> torch.Tensor:
        result = call.function.apply(*(argument(i, a) for i, a in enumerate(call.args)))  # type: ignore[attr-defined]
        outputs = outputs_of(result)
        parts = [cotangent_sum(outputs[i], c.to(outputs[i].dtype)) for i, c in cotangents.items()]
        return torch.stack([torch.real(part) if part.is_complex() else part for part in parts]).sum()

    names = {str(i): leaf for i, leaf in leaves.items()}
    local = Problem(names, loss, problem.before, Tape(), problem.lane)
    certifier = Certifier(local, seed=seed, probes=2, detection_limit=1e-3)
    try:
        point = certifier.run(list(names))
    except Exception as error:  # the Function's own code, on values it may not be made for
        _log.debug("%s cannot be judged alone: %s", function_name(call.function), error)
        return None
    if not all(name in point.gradients for name in point.names):
        return None  # another argument's gradient may account for this one
    here = {i: v for i, v in certifier.verdicts.items() if not v.displaced and v.cause != Cause.NON_FINITE_GRADIENT}
    for outcome in (Outcome.FAIL, Outcome.PASS):
        for name, verdict in here.items():
            if verdict.outcome is outcome:
                return int(name), verdict
    return None


def _incoming(gradient: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return the gradient's nonzero elements in another order, with random signs and factors from 0.5 to 1."""
    draws = torch.rand(gradient.shape, generator=generator, dtype=torch.float64).to(gradient.device)
    signs = (torch.randint(0, 2, gradient.shape, generator=generator) * 2 - 1).to(gradient.device)
    factors = (signs * (LEAST_FACTOR + (1 - LEAST_FACTOR) * draws)).to(gradient.dtype)
    dense = gradient.to_dense() if gradient.layout is not torch.strided else gradient
    used = dense != 0
    if not bool(used.any()):
        return SMALL_GRADIENT * factors
    values = dense[used]
    order = torch.randperm(values.numel(), generator=generator).to(values.device)
    shuffled = torch.zeros_like(dense)
    shuffled[used] = values[order]
    return shuffled * factors


def _row(subject: Subject, phase: LivePhase, problem: Problem, wrong: _Judged, cause: str) -> ResultRow:
    call, verdict = wrong.made.call, wrong.verdict
    name = function_name(call.function)
    dtype = problem.dtypes.get(next(iter(problem.dtypes), ""))
    why = "its incoming gradient is special there"
    if wrong.varied:
        why = f"what is uniform or zero there ({listed(wrong.varied)}) was varied for this"
    return ResultRow(
        check=FINITE_DIFFERENCE.name,
        outcome=Outcome.FAIL,
        severity=FINITE_DIFFERENCE.severity,
        phase=phase.name,
        lane=problem.lane,
        module=call.label,
        dtype=dtype,
        **verdict.numbers,
        seed=subject.seed,
        cause=cause,
        message=f"the backward of the autograd.Function {name} in {call.label} is wrong by itself: for its argument "
        f"{wrong.argument} it gives {number(verdict.measured)} along a random direction where its forward's derivative "
        f"is {number(verdict.expected)} (bound {verdict.threshold:.2g}). The loss's gradient on this batch need not "
        f"show it: {why}",
        where_to_look=f"{name}.backward, used by {call.label}; if its gradient is meant to differ, declare "
        f"expect={{'custom_gradient': [{name!r}]}}",
    )
