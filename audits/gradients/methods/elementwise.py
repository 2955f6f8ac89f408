"""The tutorial's check: every element by a central difference, relative error below 1e-5."""

from __future__ import annotations

import math
from collections.abc import Sequence

from audits.causes import Cause
from audits.gradients.methods.probe import TYPICAL_NOISE
from audits.gradients.verdicts import Verdict
from audits.lanes.arithmetic import norm
from audits.lanes.evaluation import Point
from audits.outcomes import Outcome

#: Standard deviations of noise granted to the numeric value.
NOISE_DEVIATIONS = 6.0


def check_elements(
    point: Point, names: Sequence[str], *, epsilon: float, tolerance: float, detection_limit: float
) -> dict[str, Verdict]:
    """Compare every element with the tutorial's formula.

    ``n = (L(theta + eps) - L(theta - eps)) / (2 eps)``, ``error = |a - n| / max(|a|, |n|) < tolerance``. Zero against
    zero passes. A relative error is judged where the numeric value resolves it: where ``tolerance * max(|a|, |n|)``
    is above the numeric value's own error ``b = 6 sigma / (sqrt(2) eps)``, sigma 1.2 u |L|; elsewhere ``|a - n|`` must
    stay below ``b`` plus the tolerance's share.

    Args:
        point: the problem at theta.
        names: tensors to check.
        epsilon: step of the central difference.
        tolerance: largest relative error.
        detection_limit: largest ``b sqrt(numel) / ||g||`` of a tensor that may pass.

    Returns:
        A verdict per tensor; numbers are those of the worst element, error and threshold relative.
    """
    verdicts = {}
    for name in names:
        gradient = point.gradients[name]
        count = point.count(name)
        flat = None if gradient is None else gradient.reshape(-1)
        worst = (-1.0, 0.0, 0.0, 0, 0.0)
        failures, largest_doubt = 0, 0.0
        for index in range(count):
            above = point.along_element(name, index, epsilon)
            below = point.along_element(name, index, -epsilon)
            numeric = (above - below) / (2 * epsilon)
            analytic = 0.0 if flat is None else float(flat[index])
            sigma = max(TYPICAL_NOISE * point.problem.roundoff * max(abs(above), abs(below)), point.spread)
            doubt = NOISE_DEVIATIONS * sigma / (math.sqrt(2) * epsilon)
            largest_doubt = max(largest_doubt, doubt)
            difference, size = abs(analytic - numeric), max(abs(analytic), abs(numeric))
            error = 0.0 if size == 0 else difference / size
            allowed = tolerance * size if tolerance * size >= doubt else doubt + tolerance * size
            wrong = not difference < allowed and size != 0
            failures += wrong
            score = (difference / allowed if allowed else 0.0) if math.isfinite(difference) else math.inf
            if score > worst[0]:
                worst = (score, analytic, numeric, index, error)
        slope = norm(gradient)
        limit = tolerance + largest_doubt * math.sqrt(count) / slope if slope > 0 else None
        verdicts[name] = _verdict(name, worst, failures, count, tolerance, limit, detection_limit, largest_doubt)
    return verdicts


def _verdict(
    name: str, worst: tuple[float, float, float, int, float], failures: int, count: int, tolerance: float,
    limit: float | None, detection_limit: float, doubt: float,
) -> Verdict:  # fmt: skip
    _, analytic, numeric, index, error = worst
    if failures:
        outcome, cause = Outcome.FAIL, Cause.WRONG_GRADIENT
        message = (
            f"{failures} of {count} elements of the gradient of {name!r} are wrong; at element {index} autograd gives "
            f"{analytic:.6g}, the finite difference {numeric:.6g}"
        )
    elif limit is None:
        outcome, cause = Outcome.PASS, Cause.ZERO_GRADIENT
        message = f"the gradient of {name!r} is zero and so is every finite difference (absolute limit {doubt:.3g})"
    elif limit > detection_limit:
        outcome, cause = Outcome.INCONCLUSIVE, Cause.UNRESOLVED
        message = (
            f"the gradient of {name!r} is too small for a central difference: an error below {limit:.1e} relative "
            "would not show; method 'probe' resolves more"
        )
    else:
        outcome, cause = Outcome.PASS, None
        message = f"all {count} elements of the gradient of {name!r} agree with central differences"
    return Verdict(
        outcome=outcome, measured=analytic, expected=numeric, error=error, threshold=tolerance, limit=limit,
        absolute_limit=doubt, cause=cause, message=message,
    )  # fmt: skip
