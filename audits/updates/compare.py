"""How far an update is from its reference, in units of the dtype's rounding, and what a lane can resolve."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from audits.checks.update import L2, L2_LOW, MAX, MAX_LOW
from audits.updates.rules import Rule

#: Code that is not torch's may well compute in float32 whatever the weights are: as NAdam's float32 scalars.
FOREIGN_TOLERANCE = 1e-6

#: Threshold (L2, max) by dtype.
THRESHOLDS: Mapping[torch.dtype, tuple[float, float]] = {
    torch.float64: (L2.value, MAX.value),
    torch.float32: (L2.value, MAX.value),
    torch.bfloat16: (L2_LOW.value, MAX_LOW.value),
    torch.float16: (L2_LOW.value, MAX_LOW.value),
}

#: Independent roundings of one arithmetic scatter alike; four times one draw's scatter bounds another's.
NOISE_FACTOR = 4.0

#: Bound of the worst element, a quarter of its threshold, below which the bound itself is reported.
PEAK_FROM = 4.0

#: Relative distance below which two updates point the same way to eight digits and the cosine is 1.
COSINE_FROM = 1e-4

#: Option under which a rule is told the eps of coarse float32 products, 0 where they are as fine as their dtype.
PRODUCT_EPS = "audit.product_eps"

#: Option under which a rule is told the relative error that rounding the implementation's own scalars may make.
SLACK = "audit.slack"

#: Option under which a rule is told the rounding of a scalar that multiplies every weight, relative to the weights.
WEIGHT_SLACK = "audit.weight_slack"

#: A product of two factors that are each off by an eps at most, under a square root (Adafactor's second moment), is off
#: by an eps; twice that.
PRODUCTS_FACTOR = 2.0

#: A term of the rule is resolved when a hundredth of it would be seen.
RESOLUTION = 1e-2

#: A rule whose own arithmetic is coarse can only show that a term is there at all: half of it missing would be seen.
COARSE_RESOLUTION = 0.5

#: A term that makes up less of the update than this (the decay in Adam's scale-free first step) is no part of what
#: the step's row claims; the probe and the second step judge it.
IMMATERIAL = 1e-6


@dataclass(frozen=True)
class Deviation:
    """An update against its reference.

    Attributes:
        l2: ``rms(d - d_ref) / (eps * (rms(theta) + rms(d_ref)))``.
        peak: the worst element, ``|d - d_ref|_i / (eps * (rms(theta) + rms(d_ref) + |theta_i| + |d_ref_i|))``: an
            element that is larger than its tensor's rms also rounds more coarsely.
        relative: ``rms(d - d_ref) / rms(d_ref)``.
        cosine: between d and d_ref; 1 where both are zero.
    """

    l2: float
    peak: float
    relative: float
    cosine: float


def to_double(tensor: torch.Tensor) -> torch.Tensor:
    """Return a float64 copy; complex tensors as pairs of reals, as every elementwise rule of torch treats them."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.to(torch.float64, copy=True)


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a complex tensor's parts, or the dtype itself."""
    return {torch.complex64: torch.float32, torch.complex128: torch.float64}.get(dtype, dtype)


def rms(tensor: torch.Tensor) -> float:
    """Return the root mean square; 0 for an empty tensor."""
    if not tensor.numel():
        return 0.0
    flat = tensor.reshape(-1)
    return math.sqrt(float(torch.dot(flat, flat)) / tensor.numel())


def deviation(
    actual: torch.Tensor,
    reference: torch.Tensor,
    theta: torch.Tensor,
    dtype: torch.dtype,
    known: tuple[float, float] | None = None,
) -> Deviation:
    """Compare an update with its reference.

    Args:
        actual: ``theta' - theta`` in float64.
        reference: the rule's update in float64, same shape.
        theta: the weights before, float64.
        dtype: dtype of the weights the update was made in.
        known: rms of theta and of the reference, where they were worked out already.
    """
    if not actual.numel():
        return Deviation(0.0, 0.0, 0.0, 1.0)
    eps = torch.finfo(real_dtype(dtype)).eps
    difference = actual - reference
    size, length = known or (rms(theta), rms(reference))
    off = rms(difference)
    # what is smaller than the dtype's least normal number is rounded to eps of that
    scale = eps * (size + length + torch.finfo(real_dtype(dtype)).tiny)
    # The worst element by the tensor's own scale bounds the measure; only when that is much is it taken exactly.
    least, most = torch.aminmax(difference)
    peak = max(float(most), -float(least))
    peak = peak / scale if scale else (float("inf") if peak else 0.0)
    if not peak <= PEAK_FROM:
        spread = eps * (size + length + theta.abs() + reference.abs())
        peak = float((difference.abs() / spread.clamp(min=torch.finfo(torch.float64).tiny)).max())
    moved = rms(actual) if off > COSINE_FROM * length else 0.0
    cosine = 1.0 if off <= COSINE_FROM * length else 0.0
    if moved and length:
        cosine = float((actual * reference).mean()) / (moved * length)
    return Deviation(
        l2=off / scale if scale else (float("inf") if off else 0.0),
        peak=peak,
        relative=off / length if length else (float("inf") if off else 0.0),
        cosine=cosine,
    )


@dataclass(frozen=True)
class Judgement:
    """A deviation's error beside the threshold that holds for its rule and dtype, in one unit."""

    error: float
    threshold: float
    met: bool


def judge(
    found: Deviation, rule: Rule, dtype: torch.dtype, options: Mapping[str, Any], noise: float = 0.0
) -> Judgement:
    """Apply the threshold of a rule in a dtype; ``error`` and ``threshold`` of the result share a unit.

    Args:
        found: the deviation.
        rule: the rule.
        dtype: dtype of the lane's weights.
        options: the group's options.
        noise: scatter of the rule's own coarse arithmetic, from `Rule.noise`.
    """
    dtype = real_dtype(dtype)
    l2, peak = THRESHOLDS[dtype]
    # One error stands for both measures: the larger share of its threshold, in units of L2.
    error = max(found.l2, found.peak * l2 / peak)
    tolerance = relative_tolerance(rule, dtype, options, noise)
    if options.get(WEIGHT_SLACK) and found.l2 * torch.finfo(dtype).eps <= options[WEIGHT_SLACK]:
        return Judgement(min(error, l2), l2, True)
    if tolerance is None or error <= l2:  # what the weights' own dtype cannot hold is no error of the rule
        return Judgement(error, l2, bool(error <= l2))
    turned = rule.cosine is not None and found.cosine < min(rule.cosine, 1.0 - tolerance**2)
    error = max(found.relative, 2.0 * tolerance) if turned else found.relative
    return Judgement(error, tolerance, bool(error <= tolerance))


def relative_tolerance(rule: Rule, dtype: torch.dtype, options: Mapping[str, Any], noise: float = 0.0) -> float | None:
    """Return the relative tolerance of a rule whose own arithmetic is coarser than the weights' dtype, or None."""
    if rule.products and dtype is torch.float32 and options.get(PRODUCT_EPS):
        return PRODUCTS_FACTOR * float(options[PRODUCT_EPS])
    tolerance = None if rule.relative is None else rule.relative.get(dtype)
    slack = float(options.get(SLACK, 0.0))
    if tolerance is None:
        return slack or None
    return max(tolerance, slack, NOISE_FACTOR * noise)


def resolution(
    rule: Rule,
    dtype: torch.dtype,
    options: Mapping[str, Any],
    theta: float,
    full: float,
    term: float,
    noise: float = 0.0,
) -> float:
    """Return the smallest relative error of a term of the rule that a lane would find.

    ``threshold * eps * (rms(theta) + rms(d)) / rms(d_term)``

    Args:
        rule: the rule.
        dtype: dtype of the lane's weights.
        options: the group's options.
        theta: rms of the weights.
        full: rms of the reference update.
        term: rms of the term's part in it.
        noise: scatter of the rule's own arithmetic.
    """
    if not term:
        return float("inf")
    dtype = real_dtype(dtype)
    tolerance = relative_tolerance(rule, dtype, options, noise)
    smallest = max(THRESHOLDS[dtype][0] * torch.finfo(dtype).eps, float(options.get(WEIGHT_SLACK, 0.0)))
    rounding = smallest * (theta + full) / term
    return rounding if tolerance is None else max(rounding, tolerance * full / term)
