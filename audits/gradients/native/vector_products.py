"""Vector-Jacobian products of one operation, in its own dtype and in float64, and how far they are apart."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from audits.devices import Draws
from audits.gradients.native.native_calls import NativeCall, tensors_of
from audits.lanes.arithmetic import norm
from audits.lanes.emulation import Emulating, is_emulated
from audits.lanes.precision import Observing
from audits.lanes.problem import quiet
from audits.structures import map_tensors


def exact_vjp(
    call: NativeCall,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    seed: int,
    forward: list[torch.Tensor] | None = None,
) -> list[torch.Tensor | None] | None:
    """Return a call's vector-Jacobian product in float64; the outputs are added to ``forward``."""
    with Emulating() if is_emulated(call.name) else contextlib.nullcontext():
        return vjp(call.lifted, args, kwargs, seed, forward=forward)


def vjp(
    run: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    seed: int,
    observing: Observing | None = None,
    forward: list[torch.Tensor] | None = None,
) -> list[torch.Tensor | None] | None:
    """Return the vector-Jacobian product; the outputs are added to ``forward``."""
    leaves: list[torch.Tensor] = []

    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point() or tensor.dtype.itemsize == 1:
            return tensor.clone()
        leaves.append(tensor.detach().clone().requires_grad_())
        return leaves[-1].clone()  # in-place operations may not write into a leaf

    with quiet(), observing or contextlib.nullcontext():
        result = run(*map_tensors(args, leaf), **map_tensors(kwargs, leaf))
        outputs = [o for o in tensors_of(result) if o.requires_grad and o.is_floating_point()]
        if not outputs or not leaves:
            return None
        if forward is not None:
            forward += [o.detach() for o in outputs]
        draws = Draws(seed)
        cotangents = [torch.randn(o.shape, **draws.on(o.device), dtype=torch.float32).to(o.dtype) for o in outputs]
        # the same cotangent in every lane: rounded to bfloat16, which all of them hold
        cotangents = [c.to(torch.bfloat16).to(c.dtype) for c in cotangents]
        return list(torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True))


def where_finite(
    exact: list[torch.Tensor | None],
    native: list[torch.Tensor | None],
    noisy: list[torch.Tensor | None] | None,
) -> list[list[torch.Tensor | None] | None]:
    """Zero all three where float64's own product is not finite, or beyond the range of the dtype that ran.

    A pole (``log`` at 0) says nothing of the kernel, nor does a mask times the dtype's least number, whose product
    rightly rounds to infinity.
    """
    masks = [
        None if e is None or e.layout is not torch.strided else (e if n is None else e.to(n.dtype)).isfinite()
        for e, n in zip(exact, native, strict=True)
    ]
    lanes = [exact, native, noisy]
    if all(mask is None or bool(mask.all()) for mask in masks):
        return lanes
    return [
        lane
        if lane is None
        else [v if v is None or m is None else torch.where(m, v, 0.0) for v, m in zip(lane, masks, strict=True)]
        for lane in lanes
    ]


def distance(first: list[torch.Tensor | None], second: list[torch.Tensor | None] | None) -> float:
    """Return the norm of the difference of two products; None counts as zeros."""
    others = second if second is not None else [None] * len(first)
    total = 0.0
    for a, b in zip(first, others, strict=True):
        if a is None and b is None:
            continue
        present = a if a is not None else b
        assert present is not None
        zero = torch.zeros_like(present, dtype=torch.float64)
        difference = (zero if a is None else a.double()) - (zero if b is None else b.double())
        total += norm(difference.to_dense() if difference.layout is not torch.strided else difference) ** 2
    return float(total**0.5)
