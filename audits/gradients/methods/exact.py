"""Every element by an extrapolated central difference with its own bound: small models."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from audits.causes import Cause
from audits.gradients.methods.batched import CHUNK, PlainElements, batched_elements
from audits.gradients.methods.localise import ROUNDING_ERROR, ROUNDING_LIMIT
from audits.gradients.methods.probe import DOT_ROUNDING, SMALLEST_RMS, Prober
from audits.gradients.methods.quotients import SAMPLE, Differences
from audits.gradients.methods.romberg import FIRST_STEP, SHRINK, Estimate, noise_part, romberg, romberg_at
from audits.gradients.verdicts import Verdict
from audits.lanes.arithmetic import norm
from audits.lanes.evaluation import Point
from audits.lanes.program import BranchMismatchError
from audits.outcomes import Outcome

#: Steps tried per element while the bound is too wide for the tensor, largest last.
STEPS = (FIRST_STEP, 6e-2, 0.5)

#: Below so many elements of a tensor the loop is as quick as setting up vmap.
SMALLEST_BATCH = 32

#: Tensors of more elements repay a sample, which takes four values of each of its own.
SAMPLED_FROM = 2 * SAMPLE

#: An error of so many times the bound exceeds it however the difference itself is off: ``|e| - B > B``.
CERTAIN = 2.0


def richardson(function: Callable[[float], float], step: float, sigma: float) -> Estimate:
    """Return ``R1 = (4 D(h/2) - D(h)) / 3`` with the bound ``|R1 - D(h/2)|`` plus the noise part: 4 evaluations."""
    first = (function(step) - function(-step)) / (2 * step)
    second = (function(step / 2) - function(-step / 2)) / step
    value = (4 * second - first) / 3
    noise = noise_part(sigma, 2 * step)
    return Estimate(value, abs(value - second) + noise, noise, step)


def check_exactly(
    point: Point, names: Sequence[str], *, detection_limit: float, alone: int | None = None
) -> dict[str, Verdict]:
    """Compare every element of every tensor.

    Per element ``r = |D - g_i|`` against its own bound; an exceedance by the four-point formula is judged again by the
    six-point one, and confirmed at h/8 and h/64. The stated limit is ``2 ||C|| / ||g||``, ``C_i`` the larger of
    the bound and the confirmation's noise part: an error of that norm is ``2 C_i`` at some element, and exceeds there
    and at h/8.

    Args:
        point: the problem at theta.
        names: tensors to check.
        detection_limit: largest limit of a tensor that may pass.
        alone: how many elements may be judged one by one, where batches do not resolve them; None for any number.

    Returns:
        A verdict per tensor with the numbers of its worst element, none for those that would take more elements alone
        than are allowed; a tensor whose gradient is zero here is ``pass`` with cause ``absolute`` when every difference
        is zero within its bound.
    """
    prober = Prober(point, 0)
    prober.measure(prober.everywhere(FIRST_STEP), FIRST_STEP)
    verdicts = {}
    for name in names:
        count = point.theta(name).numel()
        if alone is not None and count > max(alone, SMALLEST_BATCH) and batched_elements(point, name) is None:
            continue
        quick = _Quick.of(point, name, detection_limit, prober.sigma)
        if alone is not None:
            if quick.left > alone:
                continue
            alone -= quick.left
        verdicts[name] = _check_tensor(point, name, detection_limit, prober.sigma, quick)
    return verdicts


@dataclass(frozen=True)
class _Quick:
    """What batches say of a tensor's elements, and what an element must resolve."""

    estimates: list[Estimate | None] | None
    rms: float
    slope: float
    wanted: float
    left: int

    @classmethod
    def of(cls, point: Point, name: str, detection_limit: float, sigma: float) -> _Quick:
        gradient, theta = (None if name in point.rounded else point.gradients[name]), point.theta(name)
        rms = max(norm(theta) / math.sqrt(theta.numel()), SMALLEST_RMS)
        slope, count = norm(gradient), theta.numel()
        # what an element must resolve for the stated limit to be the detection limit
        wanted = detection_limit * slope / (CERTAIN * math.sqrt(count)) if slope > 0 else math.inf
        found = _quickly(point, name, rms, sigma, slope, wanted)
        return cls(found, rms, slope, wanted, sum(e is None for e in found) if found else count)


def _check_tensor(point: Point, name: str, detection_limit: float, sigma: float, quick: _Quick) -> Verdict:
    gradient, theta = (None if name in point.rounded else point.gradients[name]), point.theta(name)
    flat = None if gradient is None else gradient.reshape(-1).tolist()
    rms, slope, wanted, count = quick.rms, quick.slope, quick.wanted, theta.numel()
    worst: tuple[float, float, Estimate | None, int] = (-1.0, 0.0, None, 0)
    squared = 0.0
    found: dict[str, list[int]] = {"wrong": [], "unconfirmed": [], "rounding": [], "": []}
    for index in range(count):
        analytic = 0.0 if flat is None else flat[index]
        try:
            ready = quick.estimates[index] if quick.estimates else None
            if ready is not None and abs(ready.value - analytic) <= ready.bound + _slack(point, analytic):
                judged, state = ready, ""
            else:
                judged, state = _judge(point, name, index, analytic, rms, sigma, slope, wanted)
        except BranchMismatchError as error:
            why = f"Python branches on a value near theta: {error}"
            return Verdict(outcome=Outcome.INCONCLUSIVE, cause=why, message=f"cannot judge {name!r}: {why}")
        squared += _confirmed(judged, sigma, rms) ** 2
        found[state].append(index)
        score = abs(judged.value - analytic) / judged.bound if judged.bound else 0.0
        if score > worst[0]:
            worst = (score, analytic, judged, index)
    _, analytic, estimate, index = worst
    assert estimate is not None
    smallest = CERTAIN * math.sqrt(squared)
    limit = max(smallest / slope, ROUNDING_LIMIT) if slope > 0 else None
    cause: str | None = None
    if found["wrong"]:
        outcome, cause = Outcome.FAIL, Cause.WRONG_GRADIENT
        message = (
            f"{len(found['wrong'])} of {count} elements of the gradient of {name!r} are wrong; at element {index} "
            f"autograd gives {analytic:.6g}, the finite difference {estimate.value:.6g}"
        )
    elif found["unconfirmed"]:
        outcome, cause = Outcome.INCONCLUSIVE, Cause.UNCONFIRMED
        message = f"cannot judge {name!r}: element {index} exceeds its bound, and smaller steps do not confirm it"
    elif limit is None:
        outcome, cause = Outcome.PASS, Cause.ZERO_GRADIENT
        message = f"the gradient of {name!r} is zero, and so is the loss's derivative in each of its {count} elements"
    elif limit > detection_limit:
        outcome, cause = Outcome.INCONCLUSIVE, Cause.NONDETERMINISTIC if point.spread else Cause.UNRESOLVED
        message = f"the gradient of {name!r} is too small to resolve: an error below {limit:.1e} would not show"
    else:
        outcome = Outcome.PASS
        cause = Cause.ROUNDING_INSIDE_AN_OP if found["rounding"] else None
        message = f"all {count} elements of the gradient of {name!r} are the derivative of the loss"
    return Verdict(
        outcome=outcome, measured=analytic, expected=estimate.value, error=abs(estimate.value - analytic),
        threshold=estimate.bound, limit=limit, absolute_limit=smallest / math.sqrt(count), cause=cause,
        message=message,
    )  # fmt: skip


def _confirmed(estimate: Estimate, sigma: float, rms: float) -> float:
    """Return what an error must exceed, here and by the confirmation's noise part at h/8."""
    return max(estimate.bound, noise_part(sigma, estimate.step / SHRINK) / rms)


def _slack(point: Point, analytic: float) -> float:
    return DOT_ROUNDING * point.problem.roundoff * abs(analytic)


def _quickly(
    point: Point, name: str, rms: float, sigma: float, slope: float, wanted: float
) -> list[Estimate | None] | None:
    """Return estimates of all elements; None in place of those whose bound is too wide.

    By vmap where it holds. An element gets one value (a forward difference), two (a central one) or four
    (`richardson`): the fewest whose truncation, taken from a sample of the tensor's elements, leaves the bound narrow
    enough. An element whose truncation is larger than the sample's exceeds its bound and is judged by itself: a sample
    that is too kind costs time, not a verdict.
    """
    count = point.theta(name).numel()
    batch = batched_elements(point, name) if count >= SMALLEST_BATCH else None
    chunks = [list(range(start, min(start + CHUNK, count))) for start in range(0, count, CHUNK)]
    # a zero gradient has no size to hold a shared truncation against: each of its elements gets its own
    sampled = slope > 0 and count > SAMPLED_FROM
    if batch is None and not sampled:
        return None
    differences = Differences(batch or PlainElements(point, name), FIRST_STEP * rms, sigma)
    try:
        if sampled:
            differences.sample(sorted({round(i * (count - 1) / (SAMPLE - 1)) for i in range(SAMPLE)}), wanted)
        found = [differences.of(indices) for indices in chunks]
    except BranchMismatchError:
        return None
    return [estimate if _confirmed(estimate, sigma, rms) <= wanted else None for part in found for estimate in part]


def _judge(
    point: Point, name: str, index: int, analytic: float, rms: float, sigma: float, slope: float, wanted: float
) -> tuple[Estimate, str]:  # fmt: skip
    """Return the element's estimate (per unit of theta) and what it says."""

    def function(t: float) -> float:
        return point.along_element(name, index, t * rms)

    def per_unit(estimate: Estimate) -> Estimate:
        bound = estimate.bound / rms + _slack(point, analytic)
        return Estimate(estimate.value / rms, bound, estimate.noise / rms, estimate.step)

    def exceeds(estimate: Estimate) -> bool:
        return not abs(estimate.value - analytic) <= estimate.bound

    best: Estimate | None = None
    for step in STEPS:
        estimate = per_unit(richardson(function, step, sigma))
        if exceeds(estimate):
            estimate = per_unit(romberg(function, step, sigma))
        if best is None or estimate.bound < best.bound or exceeds(estimate):
            best = estimate
        if exceeds(best) or _confirmed(best, sigma, rms) <= wanted:
            break
    assert best is not None
    if not exceeds(best):
        return best, ""
    size = max(slope / math.sqrt(point.theta(name).numel()), abs(best.value))
    if abs(best.value - analytic) < ROUNDING_ERROR * size:
        return best, "rounding"
    nearer = per_unit(romberg_at(function, best.step / SHRINK, sigma))
    nearest = per_unit(romberg_at(function, best.step / SHRINK**2, sigma))
    consistent = exceeds(nearest) or abs(nearest.value - best.value) <= nearest.bound + best.bound
    if not (exceeds(nearer) and consistent):
        return best, "unconfirmed"
    return best, "wrong"
