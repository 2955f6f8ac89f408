"""Branch rules of backward operators: losses that differentiate (gradient penalties) run them inside the forward."""

from __future__ import annotations

import functools
from typing import Any

import torch

from audits.lanes.kinks.rule import Bound, Rule, register

Tensor = torch.Tensor


def _gradient(a: Bound) -> Tensor:
    gradient: Tensor = a["grad_output"] if "grad_output" in a else a["grad"]
    return gradient


def _masked(decide: Any, tie: str) -> Rule:
    """Grad where the mask, else 0."""
    return Rule(lambda a, out: decide(a), lambda mask, a: torch.where(mask, _gradient(a), 0.0), tie=tie)


register("threshold_backward", rule=_masked(lambda a: a["self"] > a["threshold"], "0 at the threshold"))
register("hardtanh_backward", rule=_masked(
    lambda a: (a["self"] > a["min_val"]) & (a["self"] < a["max_val"]), "0 at both bounds"
))  # fmt: skip
register("hardshrink_backward", rule=Rule(
    lambda a, out: (a["self"].abs() > a["lambd"]),
    lambda mask, a: torch.where(mask, a["grad_out"], 0.0),
    applies=lambda a: a["self"].is_floating_point(), tie="0 at the bounds",
))  # fmt: skip
register("softshrink_backward", rule=_masked(lambda a: a["self"].abs() > a["lambd"], "0 at the bounds"))


@functools.cache
def _slope(device: torch.device) -> float:
    """Return the 1/6 of a device's float64 kernel: torch's have float32's, on CPUs too."""
    zero = torch.zeros((), dtype=torch.float64, device=device)
    return float(torch.ops.aten.hardsigmoid_backward(torch.ones_like(zero), zero))


register("hardsigmoid_backward", rule=Rule(
    lambda a, out: (a["self"] > -3) & (a["self"] < 3),
    lambda mask, a: torch.where(
        mask, a["grad_output"] * (_slope(a["self"].device) if a["self"].dtype is torch.float64 else 1 / 6), 0.0
    ),
    tie="0 at both bounds",
))  # fmt: skip
register("hardswish_backward", rule=Rule(
    lambda a, out: (a["self"] <= -3, a["self"] >= 3),
    lambda s, a: torch.where(
        s[0], 0.0, torch.where(s[1], a["grad_output"], a["grad_output"] * (a["self"] / 3 + 0.5))
    ),
    tie="0 at -3, 1 at 3",
))  # fmt: skip
register("leaky_relu_backward", rule=Rule(
    lambda a, out: a["self"] > 0,
    lambda mask, a: torch.where(mask, a["grad_output"], a["grad_output"] * a["negative_slope"]),
    tie="the negative slope at 0",
))  # fmt: skip


def _prelu(mask: Tensor, a: Bound) -> tuple[Tensor, Tensor]:
    x, weight, gradient = a["self"], a["weight"], a["grad_output"]
    return torch.where(mask, gradient, gradient * weight), torch.where(mask, 0.0, gradient * x)


register("_prelu_kernel_backward", rule=Rule(lambda a, out: a["self"] > 0, _prelu, tie="the weight at 0"))


def _elu(negative: Tensor, a: Bound) -> Tensor:
    value, gradient = a["self_or_result"], a["grad_output"]
    slope = a["alpha"] * a["scale"]
    if a["is_result"]:
        curved = (value + slope) * a["input_scale"]
    else:
        curved = slope * a["input_scale"] * torch.exp(torch.where(negative, value, 0.0) * a["input_scale"])
    result: Tensor = gradient * torch.where(negative, curved, float(a["scale"]))
    return result


register("elu_backward", rule=Rule(
    lambda a, out: a["self_or_result"] <= 0, _elu, tie="the exponential branch's slope at 0"
))  # fmt: skip


def _scaled(gradient: Tensor, a: Bound) -> Tensor:
    return gradient / a["self"].numel() if a["reduction"] == 1 else gradient


register("huber_loss_backward", rule=Rule(
    lambda a, out: ((a["self"] - a["target"]).abs() <= a["delta"], (a["self"] - a["target"]).sgn()),
    lambda d, a: _scaled(
        a["grad_output"] * torch.where(d[0], a["self"] - a["target"], d[1] * a["delta"]), a
    ),
    tie="the same from both sides",
))  # fmt: skip
register("smooth_l1_loss_backward", rule=Rule(
    lambda a, out: ((a["self"] - a["target"]).abs() < a["beta"], (a["self"] - a["target"]).sgn()),
    lambda d, a: _scaled(
        a["grad_output"] * torch.where(d[0], (a["self"] - a["target"]) / (a["beta"] or 1.0), d[1]), a
    ),
    tie="the same from both sides",
))  # fmt: skip
