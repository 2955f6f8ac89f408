"""Vector-Jacobian products of one operation, in its own dtype and in float64, and how far they are apart."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from audits.devices import Draws
from audits.gradients.native.native_calls import NativeCall, tensors_of
from audits.lanes.arithmetic import pieces
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
        return vjp(call.lifted, args, kwargs, seed, forward=forward, writes=call.writes)


def vjp(
    run: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    seed: int,
    observing: Observing | None = None,
    forward: list[torch.Tensor] | None = None,
    *,
    writes: bool = True,
) -> list[torch.Tensor | None] | None:
    """Return the vector-Jacobian product; the outputs are added to ``forward``.

    Args:
        run: the operation.
        args: its arguments.
        kwargs: its keyword arguments.
        seed: of the incoming gradient.
        observing: sees what it runs.
        forward: gets its outputs.
        writes: whether it may write into its arguments.
    """
    leaves: list[torch.Tensor] = []

    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point() or tensor.dtype.itemsize == 1:
            return tensor.clone() if writes else tensor
        leaves.append(tensor.detach().requires_grad_())
        return leaves[-1].clone() if writes else leaves[-1]  # in-place operations may not write into a leaf

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
        cotangents = [_laid_out(c.to(torch.bfloat16).to(c.dtype), o) for c, o in zip(cotangents, outputs, strict=True)]
        return list(torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True))


def _laid_out(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return values in the layout of an output, which every backward has to expect."""
    if values.stride() == like.stride() or like.layout is not torch.strided:
        return values
    return torch.empty_like(like).copy_(values)


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
    squares = [_apart(a, b) ** 2 for a, b in zip(first, others, strict=True)]
    return float(sum(squares) ** 0.5)


def _apart(first: torch.Tensor | None, second: torch.Tensor | None) -> float:
    """Return ``||a - b||`` in float64, a piece of the flattened tensors at a time."""
    present = [_flat(t) for t in (first, second) if t is not None]
    if not present or not present[0].numel():
        return 0.0
    norms = []
    for place in pieces(present[0]):
        values = [flat[place].double() for flat in present]
        norms.append(torch.linalg.vector_norm(values[0] - values[1] if len(values) == 2 else values[0]))
    return float(torch.linalg.vector_norm(torch.stack(norms)))


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_dense() if tensor.layout is not torch.strided else tensor).reshape(-1)


def nudged(tensor: torch.Tensor, epsilon: float, draws: Draws) -> torch.Tensor:
    """Return ``t (1 + epsilon U[-1, 1])``, element by element; infinities (of attention masks) stay."""
    if not tensor.is_floating_point():
        return tensor
    flat = tensor.reshape(-1)
    moved = torch.empty_like(flat)
    for place in pieces(flat):
        here = flat[place]
        noise = torch.rand(here.shape, **draws.on(here.device), dtype=torch.float64).mul_(2).sub_(1)
        near = here + here * noise.to(here.dtype) * epsilon
        moved[place] = torch.where(near.isfinite(), near, here)
    return moved.view(tensor.shape)
