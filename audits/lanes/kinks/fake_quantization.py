"""Fake quantisation: straight-through rules, and float64 where torch's kernels take a float32 scale only.

The gradient torch documents is that of the identity inside the range and 0 outside; the scale and the zero point of the
learnable forms get gradients of their own. A replay is linear around theta with exactly these slopes, so whatever is
wrong before or behind the quantiser is found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from audits.lanes.kinks.rule import Bound, Rule, register

Tensor = torch.Tensor

_TEXT = "fake quantisation passes the gradient straight through inside its range and stops it outside"

#: A decision: input, output and, where there is one, mask at theta; for the learnable forms every slope.
Decision = dict[str, Any]


def _decide(a: Bound, out: Any) -> Decision:
    result, mask = out
    return {"self": a["self"].detach().clone(), "out": result.detach().clone(), "mask": mask.clone()}


def _replay(d: Decision, a: Bound) -> tuple[Tensor, Tensor]:
    return d["out"] + torch.where(d["mask"], a["self"] - d["self"], 0.0), d["mask"].clone()


register(
    "fake_quantize_per_tensor_affine_cachemask",
    "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
    "fake_quantize_per_channel_affine_cachemask",
    "_fused_moving_avg_obs_fq_helper",
    rule=Rule(
        _decide,
        _replay,
        tie="not a tie: 1 inside the range, 0 outside",
        convention=lambda a, decision: (None, _TEXT),
    ),
)


def _slopes(a: Bound) -> tuple[Tensor, Tensor, Tensor]:
    """Return the learnable forms' slopes by the input, the scale and the zero point, per element of the input.

    Reference: https://docs.pytorch.org, aten/src/ATen/native/quantized/FakeQuantAffine.h.
    """
    x, low, high = a["self"], a["quant_min"], a["quant_max"]
    shape = [-1 if "axis" in a and d == a["axis"] % x.dim() else 1 for d in range(x.dim())]
    scale = a["scale"].to(x.dtype).reshape(shape)
    zero = (a["zero_point"].to(x.dtype) + 0.5).floor().clamp(low, high).reshape(shape)
    levels = torch.round(zero + x / scale)
    inside = (levels >= low) & (levels <= high)
    by_scale = torch.where(
        inside, ((levels - zero) * scale - x) / scale, torch.where(levels < low, low - zero, high - zero)
    )
    return inside, by_scale * a["grad_factor"], torch.where(inside, 0.0, -scale) * a["grad_factor"]


def _decide_learnable(a: Bound, out: Tensor) -> Decision:
    kept = {key: a[key].detach().clone() for key in ("self", "scale", "zero_point")}
    return kept | {"out": out.detach().clone(), "slopes": _slopes(a)}


def _replay_learnable(d: Decision, a: Bound) -> Tensor:
    inside, by_scale, by_zero = d["slopes"]
    x = a["self"]
    shape = [-1 if "axis" in a and i == a["axis"] % x.dim() else 1 for i in range(x.dim())]
    moved = {key: (a[key] - d[key]).reshape(shape) for key in ("scale", "zero_point")}
    passed: Tensor = d["out"] + torch.where(inside, x - d["self"], 0.0)
    passed += by_scale * moved["scale"] + by_zero * moved["zero_point"]
    return passed


register(
    "_fake_quantize_learnable_per_tensor_affine",
    "_fake_quantize_learnable_per_channel_affine",
    rule=Rule(
        _decide_learnable,
        _replay_learnable,
        tie="not a tie: 1 inside the range, 0 outside",
        convention=lambda a, decision: (None, _TEXT),
    ),
)


def per_channel(x: Tensor, scale: Tensor, zero_point: Tensor, *rest: Any) -> Any:
    """Run `fake_quantize_per_channel_affine` on a float64 input; its kernel wants a float32 scale."""
    return torch.ops.aten.fake_quantize_per_channel_affine_cachemask(x, scale.float(), zero_point, *rest)


def learnable_per_channel(x: Tensor, scale: Tensor, zero_point: Tensor, *rest: Any) -> Tensor:
    """Run the learnable form of the same; its kernel wants float32 for both."""
    operator = torch.ops.aten._fake_quantize_learnable_per_channel_affine
    result: Tensor = operator(x.float(), scale.float(), zero_point.float(), *rest)
    return result.to(x.dtype)


def fused(
    x: Tensor, observing: Tensor, quantising: Tensor, low: Tensor, high: Tensor, scale: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """Run the fused observer and quantiser, which is there in float32 alone; what it observed is put back."""
    kept = (low, high, scale)
    coarse = [t.float() for t in kept]
    out, mask = torch.ops.aten._fused_moving_avg_obs_fq_helper(x.float(), observing, quantising, *coarse, *rest)
    for target, value in zip(kept, coarse, strict=True):
        if target.shape != value.shape:
            target.resize_(value.shape)
        target.copy_(value)
    return out.to(x.dtype), mask


def learnable_backward(*names: str) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Return the learnable forms' backward, which torch has in float32 alone; ``names`` are its arguments'."""

    def backward(gradient: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        a = {"grad_factor": 1.0, **dict(zip(names, args, strict=False))}
        inside, by_scale, by_zero = _slopes(a)
        others = [d for d in range(gradient.dim()) if "axis" not in a or d != a["axis"] % gradient.dim()]

        def summed(slope: Tensor, like: Tensor) -> Tensor:
            product = gradient * slope
            return (product.sum(others) if others else product).reshape(like.shape).to(like.dtype)

        passed = torch.where(inside, gradient, 0.0)
        return passed, summed(by_scale, a["scale"]), summed(by_zero, a["zero_point"])

    return backward


#: What is called in place of a kernel that takes no float64.
EMULATED: dict[str, Callable[..., Any]] = {
    "aten::fake_quantize_per_channel_affine_cachemask": per_channel,
    "aten::_fake_quantize_learnable_per_channel_affine": learnable_per_channel,
    "aten::_fused_moving_avg_obs_fq_helper": fused,
    "aten::_fake_quantize_learnable_per_tensor_affine_backward": learnable_backward(
        "self", "scale", "zero_point", "quant_min", "quant_max", "grad_factor"
    ),
    "aten::_fake_quantize_learnable_per_channel_affine_backward": learnable_backward(
        "self", "scale", "zero_point", "axis", "quant_min", "quant_max", "grad_factor"
    ),
}
