"""Branch rules of element-wise operators: activations, clamps, rounding, element-wise maxima."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch.nn import functional as F

from audits.lanes.kinks.rule import Bound, Rule, _self_is_real, register

Tensor = torch.Tensor


# relu'(0) = 0
register("relu", rule=Rule(
    lambda a, out: a["self"] > 0,
    lambda mask, a: torch.where(mask, a["self"], 0.0),
    tie="0 at 0",
))  # fmt: skip

# x > threshold ? x : value
register("threshold", rule=Rule(
    lambda a, out: a["self"] > a["threshold"],
    lambda mask, a: torch.where(mask, a["self"], float(a["value"])),
    tie="0 at the threshold",
))  # fmt: skip

register("leaky_relu", rule=Rule(
    lambda a, out: a["self"] > 0,
    lambda mask, a: torch.where(mask, a["self"], a["self"] * a["negative_slope"]),
    tie="the negative slope at 0",
))  # fmt: skip

register("_prelu_kernel", rule=Rule(
    lambda a, out: a["self"] > 0,
    lambda mask, a: torch.where(mask, a["self"], a["self"] * a["weight"]),
    tie="the weight at 0",
))  # fmt: skip


def _elu(positive: Tensor, a: Bound) -> Tensor:
    x = a["self"]
    # expm1 of the other branch's large arguments would overflow: it is evaluated at 0 there
    negative = torch.expm1(torch.where(positive, 0.0, x) * a["input_scale"]) * (a["alpha"] * a["scale"])
    return torch.where(positive, x * a["scale"], negative)


register("elu", rule=Rule(lambda a, out: a["self"] > 0, _elu, tie="the exponential branch's slope at 0"))


def _sides(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    return low, high


# hardtanh (relu6): slope 0 at both bounds
register("hardtanh", rule=Rule(
    lambda a, out: _sides(a["self"] <= a["min_val"], a["self"] >= a["max_val"]),
    lambda s, a: torch.where(s[0], float(a["min_val"]), torch.where(s[1], float(a["max_val"]), a["self"])),
    tie="0 at both bounds",
))  # fmt: skip


@functools.cache
def _sixth(device: torch.device) -> float:
    """Return the 1/6 of a device's float64 kernels: CUDA's have float32's, 3e-8 off."""
    if device.type == "cpu":
        return 1 / 6
    return float(F.hardsigmoid(torch.zeros((), dtype=torch.float64, device=device))) / 3


def _hard(x: torch.Tensor, sides: tuple[torch.Tensor, torch.Tensor], factor: torch.Tensor | float) -> torch.Tensor:
    """Return ``factor min(max(x + 3, 0), 6) / 6`` on a given side."""
    sixth = _sixth(x.device) if x.dtype is torch.float64 else 1 / 6
    return torch.where(sides[0], 0.0, torch.where(sides[1], 6 * sixth * factor, (x * sixth + 3 * sixth) * factor))


register("hardsigmoid", rule=Rule(
    lambda a, out: _sides(a["self"] <= -3, a["self"] >= 3),
    lambda s, a: _hard(a["self"], s, 1.0),
    tie="0 at both bounds",
))  # fmt: skip

# in training the noise is taped (audits.lanes.tape); in evaluation this is a leaky relu with the mean slope
register("rrelu_with_noise", rule=Rule(
    lambda a, out: a["self"] > 0,
    lambda mask, a: torch.where(mask, a["self"], a["self"] * ((a["lower"] + a["upper"]) / 2)),
    applies=lambda a: not a["training"] and _self_is_real(a),
    tie="the negative slope at 0",
))  # fmt: skip

register("celu", rule=Rule(
    lambda a, out: a["self"] > 0,
    lambda mask, a: torch.where(
        mask, a["self"], a["alpha"] * torch.expm1(torch.where(mask, 0.0, a["self"]) / a["alpha"])
    ),
    tie="the same from both sides",
))  # fmt: skip

register("hardswish", rule=Rule(
    lambda a, out: _sides(a["self"] <= -3, a["self"] >= 3),
    lambda s, a: _hard(a["self"], s, a["self"]),
    tie="0 at -3, 1 at 3",
))  # fmt: skip

register("hardshrink", rule=Rule(
    lambda a, out: a["self"].abs() > a["lambd"],
    lambda mask, a: torch.where(mask, a["self"], 0.0),
    tie="0 at the bounds",
))  # fmt: skip

register("softshrink", rule=Rule(
    lambda a, out: _sides(a["self"] < -a["lambd"], a["self"] > a["lambd"]),
    lambda s, a: torch.where(s[0], a["self"] + a["lambd"], torch.where(s[1], a["self"] - a["lambd"], 0.0)),
    tie="0 at the bounds",
))  # fmt: skip

# beyond the threshold softplus is the identity: a jump of exp(-threshold)
register("softplus", rule=Rule(
    lambda a, out: a["self"] * a["beta"] > a["threshold"],
    lambda linear, a: torch.where(
        linear, a["self"], torch.log1p(torch.exp(torch.where(linear, 0.0, a["self"]) * a["beta"])) / a["beta"]
    ),
    tie="the curved branch at the threshold",
))  # fmt: skip


def _clamp_sides(a: Bound, out: Any) -> tuple[Tensor | None, Tensor | None]:
    low, high = a.get("min"), a.get("max")
    below = None if low is None else a["self"] < low
    above = None if high is None else a["self"] > high
    if above is not None and low is not None and high is not None:
        above = above | (high < low)  # crossed bounds: the upper one wins
    return below, above


def _clamp(sides: tuple[Tensor | None, Tensor | None], a: Bound) -> Tensor:
    out: Tensor = a["self"]
    below, above = sides
    if below is not None:
        out = torch.where(below, torch.as_tensor(a["min"], dtype=out.dtype, device=out.device), out)
    if above is not None:
        out = torch.where(above, torch.as_tensor(a["max"], dtype=out.dtype, device=out.device), out)
    return out


register("clamp", "clamp_min", "clamp_max", rule=Rule(_clamp_sides, _clamp, tie="1 at the bounds"))

register("abs", rule=Rule(
    lambda a, out: a["self"].sgn(),
    lambda sign, a: a["self"] * sign,
    tie="0 at 0",
))  # fmt: skip

#: Piecewise constant: derivative 0 everywhere, so the value of theta is the branch.
register("sign", "sgn", "floor", "ceil", "round", "trunc", "floor_divide", "heaviside", rule=Rule(
    lambda a, out: out.clone(),
    lambda out, a: out.clone(),
    tie="0",
))  # fmt: skip

register("frac", rule=Rule(
    lambda a, out: a["self"].trunc(), lambda whole, a: a["self"] - whole, tie="1 at integers"
))  # fmt: skip

register("nan_to_num", rule=Rule(
    lambda a, out: (a["self"].isfinite(), out.clone()),
    lambda d, a: torch.where(d[0], a["self"], d[1]),
    tie="0 at non-finite values",
))  # fmt: skip


def _quotient(bound: Bound, rounding: str) -> Tensor:
    quotient: Tensor = torch.div(bound["self"], bound["other"], rounding_mode=rounding)
    return quotient


# a - floor(a/b) b: slope 1 in a and -floor(a/b) in b
register("remainder", rule=Rule(
    lambda a, out: _quotient(a, "floor"),
    lambda q, a: a["self"] - q * a["other"],
    applies=lambda a: any(isinstance(a[k], Tensor) and a[k].is_floating_point() for k in ("self", "other")),
    tie="the side of the quotient",
))  # fmt: skip

register("fmod", rule=Rule(
    lambda a, out: _quotient(a, "trunc"),
    lambda q, a: a["self"] - q * a["other"],
    applies=lambda a: any(isinstance(a[k], Tensor) and a[k].is_floating_point() for k in ("self", "other")),
    tie="the side of the quotient",
))  # fmt: skip

register("div", rule=Rule(
    lambda a, out: out.clone(),
    lambda out, a: out.clone(),
    applies=lambda a: a.get("rounding_mode") is not None and _self_is_real(a),
    tie="0",
))  # fmt: skip


def _either(a: Bound) -> bool:
    return all(isinstance(a[k], Tensor) for k in ("self", "other")) and _self_is_real(a)


def _split(sides: tuple[Tensor, Tensor], a: Bound) -> Tensor:
    first, second = sides
    x, y = a["self"], a["other"]
    return torch.where(first, x, torch.where(second, y, (x + y) / 2))


register("maximum", rule=Rule(
    lambda a, out: _sides(a["self"] > a["other"], a["other"] > a["self"]), _split, _either, "half to each"
))  # fmt: skip
register("minimum", rule=Rule(
    lambda a, out: _sides(a["self"] < a["other"], a["other"] < a["self"]), _split, _either, "half to each"
))  # fmt: skip
register("fmax", rule=Rule(
    lambda a, out: (a["self"] >= a["other"]) | a["other"].isnan(),
    lambda first, a: torch.where(first, a["self"], a["other"]), _either, "the first",
))  # fmt: skip
register("fmin", rule=Rule(
    lambda a, out: (a["self"] <= a["other"]) | a["other"].isnan(),
    lambda first, a: torch.where(first, a["self"], a["other"]), _either, "the first",
))  # fmt: skip

# |x| sign(y): slope sign(x) sign(y) in x, none in y
register("copysign", rule=Rule(
    lambda a, out: (torch.copysign(torch.ones_like(out), out) * a["self"].sgn(), out.clone()),
    lambda d, a: torch.where(d[0].sgn() == 0, d[1], a["self"].abs() * d[0] * a["self"].sgn()),
    tie="0 at 0",
))  # fmt: skip

# the angle's branch cut: stay within half a turn of theta's angle
register("atan2", rule=Rule(
    lambda a, out: out.clone(),
    lambda at, a: _unwrapped(torch.atan2(a["self"], a["other"]), at),
    tie="no jump at the cut",
))  # fmt: skip


def _unwrapped(angle: Tensor, near: Tensor) -> Tensor:
    return angle + 2 * math.pi * torch.round((near - angle) / (2 * math.pi))
