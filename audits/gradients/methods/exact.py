"""Every element by an extrapolated central difference with its own bound: small models."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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
        count = point.count(name)
        if alone is not None and count > max(alone, SMALLEST_BATCH) and batched_elements(point, name) is None:
            continue
        tensor = _Tensor(point, name, detection_limit, prober.sigma)
        if alone is not None:
            if tensor.left > alone:
                continue
            alone -= tensor.left
        verdicts[name] = tensor.verdict()
    return verdicts


@dataclass(frozen=True)
class _Worst:
    """The element that is furthest beyond its bound, or nearest to it."""

    score: float = -1.0
    index: int = 0
    analytic: float = 0.0
    estimate: Estimate | None = None


class _Tensor:
    """One tensor's elements: what batches say of them, what an element must resolve, and the verdict.

    Args:
        point: the problem at theta.
        name: the tensor.
        detection_limit: largest limit with which it may pass.
        sigma: the loss's noise.

    Attributes:
        left: how many elements have to be judged one by one.
    """

    def __init__(self, point: Point, name: str, detection_limit: float, sigma: float) -> None:
        self._point, self._name, self._detection_limit, self._sigma = point, name, detection_limit, sigma
        gradient, theta = (None if name in point.rounded else point.gradients[name]), point.theta(name)
        self._gradient = None if gradient is None else gradient.reshape(-1).tolist()
        self._count = theta.numel()
        self._rms = max(norm(theta) / math.sqrt(self._count), SMALLEST_RMS)
        self._slope = norm(gradient)
        # what an element must resolve for the stated limit to be the detection limit
        wanted = detection_limit * self._slope / (CERTAIN * math.sqrt(self._count))
        self._wanted = wanted if self._slope > 0 else math.inf
        self._estimates = self._quickly()
        self.left = sum(e is None for e in self._estimates) if self._estimates else self._count

    def verdict(self) -> Verdict:
        """Judge every element and return the tensor's verdict with the numbers of the worst."""
        worst, squared = _Worst(), 0.0
        found: dict[str, list[int]] = {"wrong": [], "unconfirmed": [], "rounding": [], "": []}
        for index in range(self._count):
            analytic = 0.0 if self._gradient is None else self._gradient[index]
            try:
                judged, state = self._ready(index, analytic) or self._judge(index, analytic)
            except BranchMismatchError as error:
                why = f"Python branches on a value near theta: {error}"
                message = f"cannot judge {self._name!r}: {why}"
                return Verdict(outcome=Outcome.INCONCLUSIVE, cause=why, message=message)
            squared += self._confirmed(judged) ** 2
            found[state].append(index)
            score = abs(judged.value - analytic) / judged.bound if judged.bound else 0.0
            if score > worst.score:
                worst = _Worst(score, index, analytic, judged)
        smallest = CERTAIN * math.sqrt(squared)
        limit = max(smallest / self._slope, ROUNDING_LIMIT) if self._slope > 0 else None
        outcome, cause, message = self._words(found, worst, limit)
        estimate = worst.estimate
        assert estimate is not None
        return Verdict(
            outcome=outcome, measured=worst.analytic, expected=estimate.value,
            error=abs(estimate.value - worst.analytic), threshold=estimate.bound, limit=limit,
            absolute_limit=smallest / math.sqrt(self._count), cause=cause, message=message,
        )  # fmt: skip

    def _words(
        self, found: Mapping[str, list[int]], worst: _Worst, limit: float | None
    ) -> tuple[Outcome, str | None, str]:
        """Return outcome, cause and message."""
        name, count = self._name, self._count
        if found["wrong"]:
            assert worst.estimate is not None
            return Outcome.FAIL, Cause.WRONG_GRADIENT, (
                f"{len(found['wrong'])} of {count} elements of the gradient of {name!r} are wrong; at element "
                f"{worst.index} autograd gives {worst.analytic:.6g}, the finite difference {worst.estimate.value:.6g}"
            )  # fmt: skip
        if found["unconfirmed"]:
            return Outcome.INCONCLUSIVE, Cause.UNCONFIRMED, (
                f"cannot judge {name!r}: element {worst.index} exceeds its bound, and smaller steps do not confirm it"
            )  # fmt: skip
        if limit is None:
            return Outcome.PASS, Cause.ZERO_GRADIENT, (
                f"the gradient of {name!r} is zero, and so is the loss's derivative in each of its {count} elements"
            )  # fmt: skip
        if limit > self._detection_limit:
            return Outcome.INCONCLUSIVE, Cause.NONDETERMINISTIC if self._point.spread else Cause.UNRESOLVED, (
                f"the gradient of {name!r} is too small to resolve: an error below {limit:.1e} would not show"
            )  # fmt: skip
        cause = Cause.ROUNDING_INSIDE_AN_OP if found["rounding"] else None
        return Outcome.PASS, cause, f"all {count} elements of the gradient of {name!r} are the derivative of the loss"

    def _confirmed(self, estimate: Estimate) -> float:
        """Return what an error must exceed, here and by the confirmation's noise part at h/8."""
        return max(estimate.bound, noise_part(self._sigma, estimate.step / SHRINK) / self._rms)

    def _slack(self, analytic: float) -> float:
        return DOT_ROUNDING * self._point.problem.roundoff * abs(analytic)

    def _ready(self, index: int, analytic: float) -> tuple[Estimate, str] | None:
        """Return the batch's estimate of an element where the gradient agrees with it."""
        ready = self._estimates[index] if self._estimates else None
        agrees = ready is not None and abs(ready.value - analytic) <= ready.bound + self._slack(analytic)
        return (ready, "") if ready is not None and agrees else None

    def _quickly(self) -> list[Estimate | None] | None:
        """Return estimates of all elements; None in place of those whose bound is too wide.

        By vmap where it holds. An element gets one value (a forward difference), two (a central one) or four
        (`richardson`): the fewest whose truncation, taken from a sample of the tensor's elements, leaves the bound
        narrow enough. An element whose truncation is larger than the sample's exceeds its bound and is judged by
        itself: a sample that is too kind costs time, not a verdict.
        """
        point, name, count = self._point, self._name, self._count
        batch = batched_elements(point, name) if count >= SMALLEST_BATCH else None
        chunks = [list(range(start, min(start + CHUNK, count))) for start in range(0, count, CHUNK)]
        # a zero gradient has no size to hold a shared truncation against: each of its elements gets its own
        sampled = self._slope > 0 and count > SAMPLED_FROM
        if batch is None and not sampled:
            return None
        differences = Differences(batch or PlainElements(point, name), FIRST_STEP * self._rms, self._sigma)
        try:
            if sampled:
                sample = sorted({round(i * (count - 1) / (SAMPLE - 1)) for i in range(SAMPLE)})
                differences.sample(sample, self._wanted)
            found = [differences.of(indices) for indices in chunks]
        except BranchMismatchError:
            return None
        return [e if self._confirmed(e) <= self._wanted else None for part in found for e in part]

    def _judge(self, index: int, analytic: float) -> tuple[Estimate, str]:
        """Return the element's estimate (per unit of theta) and what it says."""

        def function(t: float) -> float:
            return self._point.along_element(self._name, index, t * self._rms)

        def per_unit(estimate: Estimate) -> Estimate:
            bound = estimate.bound / self._rms + self._slack(analytic)
            return Estimate(estimate.value / self._rms, bound, estimate.noise / self._rms, estimate.step)

        def exceeds(estimate: Estimate) -> bool:
            return not abs(estimate.value - analytic) <= estimate.bound

        best: Estimate | None = None
        for step in STEPS:
            estimate = per_unit(richardson(function, step, self._sigma))
            if exceeds(estimate):
                estimate = per_unit(romberg(function, step, self._sigma))
            if best is None or estimate.bound < best.bound or exceeds(estimate):
                best = estimate
            if exceeds(best) or self._confirmed(best) <= self._wanted:
                break
        assert best is not None
        if not exceeds(best):
            return best, ""
        size = max(self._slope / math.sqrt(self._count), abs(best.value))
        if abs(best.value - analytic) < ROUNDING_ERROR * size:
            return best, "rounding"
        nearer = per_unit(romberg_at(function, best.step / SHRINK, self._sigma))
        nearest = per_unit(romberg_at(function, best.step / SHRINK**2, self._sigma))
        consistent = exceeds(nearest) or abs(nearest.value - best.value) <= nearest.bound + best.bound
        return best, "wrong" if exceeds(nearer) and consistent else "unconfirmed"
