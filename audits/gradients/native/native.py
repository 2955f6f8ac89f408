"""`gradient.native-dtype`: the operations that really train the model, each against itself in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from audits.causes import Cause
from audits.checks.gradient import NATIVE, NATIVE_CTC, NATIVE_DTYPE, NATIVE_LOW, NATIVE_PRODUCTS
from audits.devices import Draws
from audits.gradients.native.native_calls import NativeCall, collect_calls, is_low_float, tensors_of
from audits.gradients.native.vector_products import distance, exact_vjp, finite_masks, masked, nudged, vjp
from audits.gradients.native.whole_model import NativeGradient
from audits.lanes.arithmetic import norm
from audits.lanes.evaluation import Point
from audits.lanes.lifted_loss import lifted_loss
from audits.lanes.lifting import lift_tensor
from audits.lanes.precision import INSIDE_EPS, Arithmetic, Observing
from audits.live.subject import LivePhase, Subject
from audits.outcomes import Lane, Outcome, ResultRow, finite

#: How an arithmetic is named that no switch tells but the forward shows.
AS_FORWARD = "coarse, as its forward"
#: Operations with a tolerance of their own.
TOLERANCES = {"_ctc_loss": NATIVE_CTC.value}


@dataclass(frozen=True)
class Deviation:
    """How far one call's native vector-Jacobian product is from float64's; the call without its inputs."""

    call: NativeCall
    error: float
    tolerance: float
    size: float
    arithmetic: Arithmetic

    @property
    def ratio(self) -> float:
        """Error over tolerance."""
        return self.error / self.tolerance if self.tolerance else float(self.error > 0)


def check_native(subject: Subject, phase: LivePhase, gradient: NativeGradient | None = None) -> list[ResultRow]:
    """Judge every operation of one phase's native forward by its own vector-Jacobian product.

    ``||vjp_native - vjp_float64|| <= C (eps ||vjp_float64|| + ||vjp_float64(x + 1 ulp) - vjp_float64(x)||)`` at the
    recorded input and a random cotangent; C is 64 in float32, 16 below. ``eps`` and the ulp are those of the arithmetic
    that ran: TF32's, C = 4, where torch's switches let float32 products run in it. One row per operation, its worst
    call's.

    Args:
        subject: the open subject.
        phase: the phase.
        gradient: its native gradient, where it was compared with float64's already.

    Returns:
        The rows, and one more that only measures how far the whole model's native gradient is from float64's.
    """
    try:
        calls, left_out = collect_calls(subject, phase)
        rows = _judge_all(subject, phase, calls, left_out)
        if rows:
            rows.append(_whole_model(subject, phase, gradient))
        return rows
    except Exception as error:  # the model's own code runs here: whatever it raises is its answer
        text = " ".join(str(error).split())[:300]
        return [_row(subject, phase, outcome=Outcome.INCONCLUSIVE, cause=Cause.CANNOT_EVALUATE.at(type(error).__name__),
                     message=f"the operations of phase {phase.name!r} could not be recorded: {text}")]  # fmt: skip
    finally:
        subject.reset()


def _judge_all(subject: Subject, phase: LivePhase, calls: list[NativeCall], left_out: int) -> list[ResultRow]:
    worst: dict[str, Deviation] = {}
    unjudged: dict[str, str] = {}
    for position in range(len(calls)):
        call = calls.pop(0)  # its inputs are let go of with it
        try:
            found = _deviation(call, subject.seed + 7919 * position)
            if found is not None and found.ratio > 1:
                again = _deviation(call, subject.seed + 7919 * position + 1)
                found = found if again is None else min(found, again, key=lambda d: d.ratio)
        except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError) as error:
            unjudged.setdefault(call.name, f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")
            continue
        if found is not None and (call.name not in worst or found.ratio > worst[call.name].ratio):
            worst[call.name] = found
    rows = [_deviation_row(subject, phase, found) for found in worst.values()]
    if left_out and rows:
        rows.append(_row(subject, phase, outcome=Outcome.SKIPPED, cause=Cause.MEMORY,
                         message=f"{left_out} further calls were not kept for lack of memory"))  # fmt: skip
    for name, why in unjudged.items():
        if name not in worst and "does not require grad" not in why and "not implemented" in why and "Double" in why:
            rows.append(_row(subject, phase, outcome=Outcome.SKIPPED, cause=Cause.NO_FLOAT64_KERNEL,
                             message=f"{name} has no float64 counterpart to be judged by: {why}"))  # fmt: skip
    return rows


def _deviation(call: NativeCall, seed: int) -> Deviation | None:
    """Return the call's deviation, None when nothing in it is differentiable."""
    observing = Observing()
    outputs: list[torch.Tensor] = []
    native = vjp(call.run, call.args, call.kwargs, seed, observing, outputs, writes=call.writes, name=call.name)
    if native is None:
        return None
    exact_outputs: list[torch.Tensor] = []
    exact = exact_vjp(call, lift_tensor, seed, exact_outputs)
    if exact is None:
        return None
    arithmetic = _arithmetic(call, observing, outputs, exact_outputs)
    epsilon = arithmetic.eps
    masks = finite_masks(exact, native)
    exact = masked(exact, masks)
    size, error = distance(exact), distance(exact, masked(native, masks))
    del native, outputs, exact_outputs  # three products of one large weight would be the peak of an audit's memory
    draws = Draws(seed + 3)
    noisy = exact_vjp(call, lambda t: nudged(t, epsilon, draws), seed)
    response = 0.0 if noisy is None else distance(exact, masked(noisy, masks))
    without_inputs = replace(call, args=(), kwargs={})
    tolerance = _constant(call, arithmetic) * (epsilon * size + response)
    return Deviation(without_inputs, error, tolerance, size, arithmetic)


def _constant(call: NativeCall, arithmetic: Arithmetic) -> float:
    if arithmetic.inside in (*INSIDE_EPS, AS_FORWARD):
        return NATIVE_PRODUCTS.value
    return TOLERANCES.get(call.name, NATIVE.value if arithmetic.dtype is torch.float32 else NATIVE_LOW.value)


def _arithmetic(
    call: NativeCall, observing: Observing, outputs: list[torch.Tensor], exact: list[torch.Tensor]
) -> Arithmetic:
    """Return the coarsest arithmetic of a call: its tensors', its products', or what its own forward shows.

    What a custom Function's kernel does inside no switch tells (Triton's ``dot`` takes TF32 by itself): a forward that
    is off by more than float32 explains was computed in something coarser, and its backward may have been as well, up
    to TF32's rounding.
    """
    dtypes = [t.dtype for t in tensors_of((call.args, call.kwargs)) if is_low_float(t)]
    dtype = max(dtypes, key=lambda d: torch.finfo(d).eps)
    found = Arithmetic(dtype, torch.finfo(dtype).eps)
    if observing.found is not None and observing.found.eps > found.eps:
        found = observing.found
    if call.own and dtype is torch.float32:
        pairs = [(e, o) for o, e in zip(outputs, exact, strict=False) if o.shape == e.shape]
        size = sum(norm(e) ** 2 for e, _ in pairs) ** 0.5
        off = distance([e for e, _ in pairs], [o for _, o in pairs]) / size if size else 0.0
        if off > NATIVE.value * found.eps:
            found = Arithmetic(dtype, min(2 * off, INSIDE_EPS["tf32"]), AS_FORWARD)
    return found


def _whole_model(subject: Subject, phase: LivePhase, native: NativeGradient | None) -> ResultRow:
    """Say how far the native gradient of the whole model is from float64's; never judged.

    Healthy deep nets deviate beyond any fixed threshold: branches flip and conditioning amplifies.
    """
    native = native or NativeGradient(subject, phase)
    if not native.observed:
        try:
            with lifted_loss(subject, phase) as problem:
                problem.observe = native.observe
                Point(problem).restore()
        except Exception as error:
            return _row(subject, phase, outcome=Outcome.SKIPPED, cause=Cause.MEASURED_ONLY,
                        message=f"no whole-model gradient in float64: {type(error).__name__}")  # fmt: skip
    relative = native.relative()
    part = f", by {native.sampled:,} of {native.elements:,} elements" if native.sampled < native.elements else ""
    return _row(
        subject, phase, outcome=Outcome.SKIPPED, cause=Cause.MEASURED_ONLY, measured=finite(relative),
        message=f"the whole model's native gradient differs from float64's by {relative:.1e} relative{part} (measured, "
        "not judged: branches flip and conditioning amplifies in healthy nets)",
    )  # fmt: skip


def _deviation_row(subject: Subject, phase: LivePhase, found: Deviation) -> ResultRow:
    relative = found.error / found.size if found.size else 0.0
    allowed = found.tolerance / found.size if found.size else 0.0
    where = found.call.label
    if not found.ratio <= 1:
        finite_error = found.error == found.error and found.error != float("inf")
        outcome = Outcome.FAIL if finite_error else Outcome.INCONCLUSIVE
        message = (
            f"the gradient of {found.call.name} in {where} is off by {relative:.1e} relative in {found.arithmetic}, "
            f"{allowed:.1e} is allowed"
        )
    else:
        outcome = Outcome.PASS
        message = (
            f"the gradient of {found.call.name} in {found.arithmetic} agrees with float64 ({relative:.1e} of "
            f"{allowed:.1e})"
        )
    row = _row(subject, phase, outcome=outcome, message=message)
    return replace(
        row, module=where, dtype=str(found.arithmetic), error=finite(found.error), threshold=finite(found.tolerance),
        detection_limit=finite(allowed), gradient_norm=finite(found.size),
        cause=f"{found.call.name} in {found.arithmetic}" if outcome is not Outcome.PASS else None,
        where_to_look=f"{found.call.name}, called by {where}" if outcome is not Outcome.PASS else None,
        measured=finite(relative), expected=0.0,
    )  # fmt: skip


def _row(subject: Subject, phase: LivePhase, **fields: Any) -> ResultRow:
    return ResultRow(check=NATIVE_DTYPE.name, severity=NATIVE_DTYPE.severity, phase=phase.name, lane=Lane.NATIVE,
                     seed=subject.seed, **fields)  # fmt: skip
