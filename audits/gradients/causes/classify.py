"""What kind of failure it is, and whether it is one element."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad

from audits.gradients.methods.probe import Prober
from audits.gradients.methods.swapping import slots_of, swapped
from audits.lanes.directions import Direction, Given, values_of
from audits.lanes.problem import Problem, quiet
from audits.lanes.program import BranchMismatchError, Free
from audits.wording import module_label

#: jvp and vjp of one graph agree to rounding; a wrong formula differs by far more.
JVP_TOLERANCE = 1e-6

#: Narrowings of the window a single wrong element is looked for in.
NARROWINGS = 4


def jvp_agrees(model: nn.Module, problem: Problem, direction: Direction, expected: float) -> bool | None:
    """Return whether forward-mode differentiation gives autograd's ``<g, v>``; None where there is none.

    Forward mode is no independent oracle (a detached value has no tangent either), it only sorts a failure: agreement
    points to a detached value or a stop-gradient, disagreement to a backward formula.
    """
    owned = dict(model.named_parameters())
    if any(t.is_complex() or owned.get(name) is not t for name, t in problem.tensors.items()):
        return None
    problem.before()
    moving = set(direction.names)
    try:
        with quiet(), forward_ad.dual_level():
            duals = {
                name: forward_ad.make_dual(tensor.detach(), values_of(direction, name))
                if name in moving
                else tensor.detach()
                for name, tensor in problem.tensors.items()
            }
            with swapped(slots_of(model, problem.tensors), duals), Free(problem.tape.cursor(), lift=problem.lifts):
                tangent = forward_ad.unpack_dual(problem.loss()).tangent
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return None
    value = 0.0 if tangent is None else float(tangent)
    return abs(value - expected) <= JVP_TOLERANCE * max(abs(value), abs(expected))


def single_wrong_element(prober: Prober, name: str, step: float) -> tuple[int, float, float] | None:
    """Find the element if exactly one of a tensor's gradient is wrong.

    The residual along w and along ``w * j/n`` (j the element's place in a window) have the ratio ``j/n`` when one
    element alone is wrong; the window narrows to what the bounds leave, and the element is then judged by itself.

    Returns:
        (flat index, autograd's value, finite difference), or None.
    """
    with prober.point.gradients.holding([name]):
        return _single(prober, name, step)


def _single(prober: Prober, name: str, step: float) -> tuple[int, float, float] | None:
    theta = prober.point.theta(name)
    low, high = 0, theta.numel()
    scale = prober.scales([name], step)[name]
    base = values_of(prober.direction({name: scale}), name)
    places = torch.arange(theta.numel(), dtype=theta.dtype, device=theta.device).view_as(theta)
    try:
        for _ in range(NARROWINGS):
            inside = (places >= low) & (places < high)
            flat = torch.where(inside, base, 0.0)
            first = prober.along(Given({name: flat}), step)
            if not first.exceeds:
                return None
            ramp = flat * ((places - low + 1) / (high - low))
            second = prober.along(Given({name: ramp}), step)
            error, moment = (p.estimate.value - p.autograd for p in (first, second))
            ratio = moment / error
            doubt = (second.bound + abs(ratio) * first.bound) / abs(error)
            width = high - low
            new_low = low + max(0, math.floor((ratio - doubt) * width - 1))
            new_high = low + min(width, math.ceil((ratio + doubt) * width))
            if new_high <= new_low:
                return None
            if new_high - new_low >= width:
                break
            low, high = new_low, new_high
            if high - low <= 1:
                break
        index = low + round(ratio * width) - 1 if high - low > 1 else low
        if not 0 <= index < theta.numel():
            return None
        alone = torch.zeros_like(theta)
        alone.view(-1)[index] = base.reshape(-1)[index]
        whole = prober.along(Given({name: base}), step)
        one = prober.along(Given({name: alone}), step)
    except BranchMismatchError:
        return None
    rest = (whole.estimate.value - whole.autograd) - (one.estimate.value - one.autograd)
    if not one.exceeds or abs(rest) > whole.bound + one.bound:
        return None
    weight = float(base.reshape(-1)[index])
    return index, one.autograd / weight, one.estimate.value / weight


def backward_hooks(model: nn.Module, problem: Problem) -> list[str]:
    """Return what carries hooks that may change gradients: tensors by name, modules by path."""
    found = [f"a hook on {name!r}" for name, tensor in problem.tensors.items() if _hooks(tensor)]
    for path, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            found.append(f"a backward hook on {module_label(type(module), path)}")
    return found


def _hooks(tensor: torch.Tensor) -> Any:
    return getattr(tensor, "_backward_hooks", None)
