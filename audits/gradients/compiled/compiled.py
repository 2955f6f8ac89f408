"""`gradient.compiled`: the code that `torch.compile` made, held against the eager code or against its own loss.

Without random numbers eager and compiled code are one function and their gradients must agree. With them they are not:
the compiler draws in its own order. Then the compiled loss, seeded alike before every evaluation, is a function of its
own, and its gradient must be that function's derivative. A forward that is partly run again in the backward and draws
anew (`activation_memory_budget` below 1 in torch 2.13) fails that.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from audits.causes import Cause
from audits.checks.gradient import COMPILED, NATIVE, NATIVE_LOW, NATIVE_PRODUCTS
from audits.gradients.compiled.compiled_slope import CompiledLoss, Slope
from audits.gradients.methods.probe import SMALLEST_RMS
from audits.lanes.arithmetic import norm
from audits.lanes.lifted_loss import lifted_loss, one_number
from audits.lanes.precision import INSIDE_EPS, inside_products, products_in
from audits.lanes.problem import as_real, differentiate, may_step
from audits.lanes.program import TapeOnly
from audits.lanes.tape import Tape
from audits.live.subject import LivePhase, Subject
from audits.outcomes import Lane, Outcome, ResultRow, finite
from audits.recipe.compiled_parts import compiled_anything, compiled_code, describe_parts, eager
from audits.structures import map_tensors

#: Both are judged this many root mean squares away from theta, where no value sits exactly on a kink, at two points:
#: where rounding takes another branch at one of them, it does not at the other.
DISPLACEMENT = 1e-3
POINTS = 2

#: Tensors told apart one by one where the joint slope is wrong.
NAMED = 64

Gradients = Mapping[str, torch.Tensor | None]
_log = logging.getLogger(__name__)


def check_compiled(subject: Subject) -> list[ResultRow]:
    """Judge the compiled code's gradients in every phase; no row where nothing is compiled.

    Args:
        subject: an open subject; it is reset before this returns.
    """
    if not subject.compiled or not subject.settings.wants_check(COMPILED.name):
        return []
    rows: list[ResultRow] = []
    for phase in subject.phases:
        if not subject.settings.compiled:
            message = (
                f"compiled code in {describe_parts(subject.compiled)} ran eagerly; the setting compiled=true judges it"
            )
            rows.append(_row(subject, phase, outcome=Outcome.SKIPPED, cause=Cause.NOT_RUN, message=message))
            continue
        try:
            with warnings.catch_warnings(), compiled_code(subject.model, subject.compiled, subject.compiled_with):
                warnings.simplefilter("ignore")  # what the compiler warns of was said when it trained
                found = _against_itself(subject, phase) if _draws(subject, phase) else _against_eager(subject, phase)
            if not compiled_anything():
                raise RuntimeError("the compiler compiled nothing")
            rows += found
        except Exception as error:  # the compiler and the model's own code run here
            _log.debug("the compiled code could not be judged", exc_info=True)
            text = " ".join(str(error).split())[:300]
            message = f"the compiled code could not be run: {type(error).__name__}: {text}"
            rows.append(_row(subject, phase, outcome=Outcome.INCONCLUSIVE, cause=Cause.CANNOT_RUN, message=message))
        finally:
            subject.reset()
    return rows


def compiled_limits(subject: Subject, rows: list[ResultRow]) -> tuple[str, ...]:
    """Return the sentence a report ends its headline with when compiled code was not judged."""
    if not subject.compiled:
        return ()
    judged = {row.phase for row in rows if row.check == COMPILED.name and row.outcome.resolved}
    if judged.issuperset(phase.name for phase in subject.phases):
        return ()
    return (
        f"Compiled code was not audited: torch.compile is used for {describe_parts(subject.compiled)}, and only the "
        "eager code behind it was run.",
    )


def _draws(subject: Subject, phase: LivePhase) -> bool:
    """Whether the eager loss draws random numbers."""
    subject.reset()
    tape = Tape()
    with torch.enable_grad(), eager(), subject.autocast(), TapeOnly(tape):
        subject.loss(phase)
    return bool(tape.draws)


def _shifts(subject: Subject, phase: LivePhase, point: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(subject.seed + 71 + point)
    shifts = {}
    for name, parameter in phase.parameters.items():
        size = max(norm(parameter.detach()) / max(parameter.numel(), 1) ** 0.5, SMALLEST_RMS)
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        shifts[name] = noise.to(parameter.device) * (DISPLACEMENT * size)
    return shifts


# Without random numbers: compiled against eager, in the model's own dtype.


def _against_eager(subject: Subject, phase: LivePhase) -> list[ResultRow]:
    dtypes = {p.dtype for p in phase.parameters.values() if not p.is_complex()}
    if subject.recipe.precision != "native":
        dtypes.add(torch.bfloat16 if subject.recipe.precision.startswith("bf16") else torch.float16)
    epsilon = max((torch.finfo(dtype).eps for dtype in dtypes), default=torch.finfo(torch.float64).eps)
    constant = NATIVE.value if epsilon <= torch.finfo(torch.float32).eps else NATIVE_LOW.value
    inside = inside_products(products_in(subject.model), subject.device) if torch.float32 in dtypes else None
    if inside is not None and INSIDE_EPS[inside] > epsilon:  # the two may round their products by different algorithms
        epsilon, constant = INSIDE_EPS[inside], NATIVE_PRODUCTS.value
    ratios: dict[str, list[tuple[float, float, float]]] = {name: [] for name in phase.parameters}
    for point in range(POINTS):
        shifts = _shifts(subject, phase, point)
        exact = _gradients(subject, phase, shifts, compiled=False)
        made = _gradients(subject, phase, shifts, compiled=True)
        noisy = [_gradients(subject, phase, shifts, compiled=False, noise=(epsilon, draw)) for draw in range(2)]
        for name in ratios:
            size = norm(exact[name])
            response = max(_distance(exact[name], other[name]) for other in noisy)
            error = _distance(exact[name], made[name])
            ratios[name].append((error, constant * (epsilon * size + response), size))
    rows = []
    for name, found in ratios.items():
        error, allowed, size = min(found, key=lambda f: f[0] / f[1] if f[1] else f[0])
        relative = error / size if size else error
        failed = all(not e <= a for e, a, _ in found)
        outcome = Outcome.PASS if not failed else Outcome.FAIL if math.isfinite(error) else Outcome.INCONCLUSIVE
        text = "agrees with" if not failed else "is not"
        rows.append(
            _row(
                subject, phase, outcome=outcome, lane=Lane.NATIVE, parameter=name, module=subject.owner(name).label,
                numel=subject.parameters[name].numel(), dtype=str(subject.parameters[name].dtype),
                error=finite(error), threshold=finite(allowed), measured=finite(relative), expected=0.0,
                gradient_norm=finite(size), cause=Cause.COMPILED_GRADIENT if failed else None,
                message=f"the compiled code's gradient of {name!r} {text} the eager code's ({relative:.1e} relative, "
                f"{allowed / size if size else allowed:.1e} is allowed)",
            )
        )  # fmt: skip
    return rows


def _gradients(
    subject: Subject, phase: LivePhase, shifts: Mapping[str, torch.Tensor], *, compiled: bool,
    noise: tuple[float, int] | None = None,
) -> Gradients:  # fmt: skip
    subject.reset()
    generator = torch.Generator().manual_seed(subject.seed + 83 + (noise[1] if noise else 0))

    def nudged(tensor: torch.Tensor) -> torch.Tensor:
        if noise is None or not tensor.is_floating_point():
            return tensor
        draws = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device) * 2 - 1
        moved = tensor.detach() + tensor.detach() * (draws * noise[0]).to(tensor.dtype)
        return torch.where(moved.isfinite(), moved, tensor.detach()).requires_grad_(tensor.requires_grad)

    for name, parameter in phase.parameters.items():
        parameter.data.add_(shifts[name].to(parameter.dtype))
        if noise is not None:
            parameter.data.copy_(nudged(parameter.detach()))
    batches = [(weight, map_tensors(batch, nudged)) for weight, batch in subject.micro_batches(phase)]
    with torch.enable_grad(), subject.autocast(), _stance(compiled=compiled):
        value = one_number(subject.loss(phase, batches))
        found = differentiate(value, phase.parameters, hooked=may_step(subject.model))
    return {name: None if g is None else as_real(g.detach()).double() for name, g in found.items()}


def _stance(*, compiled: bool) -> Any:
    return torch.compiler.set_stance("default") if compiled else eager()


def _distance(first: torch.Tensor | None, second: torch.Tensor | None) -> float:
    if first is None or second is None:
        return norm(first) + norm(second)
    return norm(first - second)


# With random numbers: the compiled loss against its own gradient, in float64.


def _against_itself(subject: Subject, phase: LivePhase) -> list[ResultRow]:
    with lifted_loss(subject, phase) as problem:
        joint: list[Slope] = []
        wrong: list[tuple[str | None, Slope]] = []
        for point in range(POINTS):
            shifts = _shifts(subject, phase, point)
            here = {n: t.detach().clone() + shifts[n].to(t.dtype) for n, t in problem.tensors.items()}
            function = CompiledLoss(subject, phase, problem, here)
            try:
                joint.append(function.slope(list(here), subject.seed + point))
                if joint[-1].exceeds and point == POINTS - 1 and all(slope.exceeds for slope in joint):
                    named = [(n, function.slope([n], subject.seed + 5)) for n in list(here)[:NAMED]]
                    wrong = [(name, slope) for name, slope in named if slope.exceeds]
            finally:
                function.restore()
    if not all(slope.exceeds for slope in joint):
        best = min(joint, key=lambda slope: slope.residual / slope.allowed)
        if not best.resolved:
            numbers = f"{best.allowed:.1e} is allowed for a slope of {best.size:.1e}"
            message = f"the compiled loss is too noisy for its gradient to be judged: {numbers}"
            return [_slope_row(subject, phase, None, best, Outcome.INCONCLUSIVE, message)]
        message = "the compiled code's gradient is its own loss's derivative at equal draws"
        return [_slope_row(subject, phase, None, best, Outcome.PASS, message)]
    whole: list[tuple[str | None, Slope]] = [(None, joint[-1])]
    return [
        _slope_row(
            subject, phase, name, slope, Outcome.FAIL if math.isfinite(slope.residual) else Outcome.INCONCLUSIVE,
            f"the compiled code's gradient {f'of {name!r} ' if name else ''}is not its own loss's derivative at equal "
            f"draws: it gives {slope.expected:.6g} where the derivative is {slope.estimate.value:.6g}. A forward that "
            "is run again in the backward and draws anew does that",
        )
        for name, slope in (wrong or whole)
    ]  # fmt: skip


def _slope_row(
    subject: Subject, phase: LivePhase, name: str | None, slope: Slope, outcome: Outcome, message: str
) -> ResultRow:
    return _row(
        subject, phase, outcome=outcome, lane=Lane.FLOAT64, parameter=name,
        module=subject.owner(name).label if name else None, measured=finite(slope.expected),
        expected=finite(slope.estimate.value), error=finite(slope.residual), threshold=finite(slope.allowed),
        cause=Cause.COMPILED_GRADIENT if outcome is not Outcome.PASS else None, message=message,
    )  # fmt: skip


def _row(subject: Subject, phase: LivePhase, **fields: Any) -> ResultRow:
    return ResultRow(check=COMPILED.name, severity=COMPILED.severity, phase=phase.name, seed=subject.seed, **fields)
