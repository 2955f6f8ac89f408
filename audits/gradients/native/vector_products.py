"""Vector-Jacobian products of one operation, in its own dtype and in float64, and how far they are apart."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from audits.devices import Draws
from audits.gradients.native.native_calls import NativeCall, tensors_of
from audits.lanes.arithmetic import pieces
from audits.lanes.emulation import Emulating, is_emulated
from audits.lanes.lifting import lift_tensor
from audits.lanes.precision import Observing
from audits.lanes.problem import quiet
from audits.structures import map_tensors

#: Outputs, by position, whose columns or rows are vectors of no sign of their own: each lane has its own signs.
_SIGNLESS = {"_linalg_eigh": {1: "columns"}, "_linalg_svd": {0: "columns", 2: "rows"}}

#: A product: for each differentiable argument its part, None where there is none.
Product = list[torch.Tensor | None]


def exact_vjp(
    call: NativeCall,
    lifted: Callable[[torch.Tensor], torch.Tensor],
    seed: int,
    forward: list[torch.Tensor] | None = None,
) -> Product | None:
    """Return a call's vector-Jacobian product in float64, at its tensors ``lifted``; ``forward`` gets the outputs."""
    args, kwargs = map_tensors(call.args, lifted), map_tensors(call.kwargs, lifted)
    with Emulating() if is_emulated(call.name) else contextlib.nullcontext():
        return vjp(call.lifted, args, kwargs, seed, forward=forward, writes=call.writes, name=call.name)


def vjp(
    run: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    seed: int,
    observing: Observing | None = None,
    forward: list[torch.Tensor] | None = None,
    *,
    writes: bool = True,
    name: str = "",
) -> Product | None:
    """Return the vector-Jacobian product; the outputs are added to ``forward``.

    Args:
        run: the operation.
        args: its arguments.
        kwargs: its keyword arguments.
        seed: of the incoming gradient.
        observing: sees what it runs.
        forward: gets its outputs.
        writes: whether it may write into its arguments.
        name: the operator's.
    """
    leaves: list[torch.Tensor] = []

    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point() or tensor.dtype.itemsize == 1:
            return tensor.clone() if writes else tensor
        leaves.append(tensor.detach().requires_grad_())
        return leaves[-1].clone() if writes else leaves[-1]  # in-place operations may not write into a leaf

    with quiet(), observing or contextlib.nullcontext():
        result = run(*map_tensors(args, leaf), **map_tensors(kwargs, leaf))
        found = {i: o for i, o in enumerate(tensors_of(result)) if o.requires_grad and o.is_floating_point()}
        if not found or not leaves:
            return None
        outputs = list(found.values())
        if forward is not None:
            forward += [o.detach() for o in outputs]
        draws, vectors = Draws(seed), _SIGNLESS.get(name, {})
        cotangents = [_laid_out(_cotangent(o, draws, vectors.get(i)), o) for i, o in found.items()]
        return list(torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True))


def _cotangent(output: torch.Tensor, draws: Draws, vectors: str | None) -> torch.Tensor:
    """Return an incoming gradient for an output, the same in every lane.

    Where the output's ``vectors`` have no sign of their own, that of ``sum_k c_k v_k' S v_k``, a random symmetric S:
    ``2 c_k S v_k``, which changes its sign with v_k.
    """
    if vectors is None or output.dim() < 2 or not output.numel():
        return _drawn(output.shape, output, draws)
    columns = output.detach() if vectors == "columns" else output.detach().mT
    height, count = columns.shape[-2:]
    weights = _drawn((*columns.shape[:-2], 1, count), output, draws)
    drawn = _drawn((*columns.shape[:-2], height, height), output, draws)
    found = (drawn + drawn.mT) @ columns * weights
    return found if vectors == "columns" else found.mT


def _drawn(shape: Sequence[int], like: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Return normal numbers, rounded to bfloat16, which all dtypes hold."""
    drawn = torch.randn(tuple(shape), **draws.on(like.device), dtype=torch.float32)
    return drawn.to(torch.bfloat16).to(like.dtype)


def _laid_out(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return values in the layout of an output, which every backward has to expect."""
    if values.stride() == like.stride() or like.layout is not torch.strided:
        return values
    return torch.empty_like(like).copy_(values)


def finite_masks(exact: Product, native: Product) -> Product | None:
    """Return where float64's own product is finite and within the range of the dtype that ran; None for everywhere.

    A pole (``log`` at 0) says nothing of the kernel, nor does a mask times the dtype's least number, whose product
    rightly rounds to infinity.
    """
    pairs = [
        (None, None) if e is None or e.layout is not torch.strided else (e, e.dtype if n is None else n.dtype)
        for e, n in zip(exact, native, strict=True)
    ]
    if all(e is None or _all_finite(e, dtype) for e, dtype in pairs):
        return None
    return [None if e is None else e.to(dtype).isfinite() for e, dtype in pairs]


def _all_finite(tensor: torch.Tensor, dtype: torch.dtype | None) -> bool:
    flat = _flat(tensor)
    found = [flat[place].to(dtype).isfinite().all() for place in pieces(flat)]
    return not found or bool(torch.stack(found).all())


def masked(product: Product, masks: Product | None) -> Product:
    """Return a product with zeros outside the masks."""
    if masks is None:
        return product
    return [v if v is None or m is None else torch.where(m, v, 0.0) for v, m in zip(product, masks, strict=True)]


def distance(first: Product, second: Product | None = None) -> float:
    """Return the norm of the difference of two products; None counts as zeros."""
    others = second if second is not None else [None] * len(first)
    squares = [_apart(a, b) ** 2 for a, b in zip(first, others, strict=True)]
    return float(sum(squares) ** 0.5)


def _apart(first: torch.Tensor | None, second: torch.Tensor | None) -> float:
    """Return ``||a - b||`` in float64, a piece of the flattened tensors at a time."""
    tensors = [t for t in (first, second) if t is not None]
    order = _order_in_memory(tensors)
    present = [_flat(t if order is None else t.permute(order)) for t in tensors]
    if not present or not present[0].numel():
        return 0.0
    norms = []
    for place in pieces(present[0]):
        values = [flat[place].double() for flat in present]
        norms.append(torch.linalg.vector_norm(values[0] - values[1] if len(values) == 2 else values[0]))
    return float(torch.linalg.vector_norm(torch.stack(norms)))


def _order_in_memory(tensors: Sequence[torch.Tensor]) -> list[int] | None:
    """Return the order of dimensions that tensors lie in, None where they differ: read so, none of them is copied.

    The weight's part of a linear layer's product lies transposed.
    """
    if not tensors or any(t.layout is not torch.strided or t.stride() != tensors[0].stride() for t in tensors):
        return None
    stride = tensors[0].stride()
    return sorted(range(len(stride)), key=lambda dimension: -stride[dimension])


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_dense() if tensor.layout is not torch.strided else tensor).reshape(-1)


def nudged(tensor: torch.Tensor, epsilon: float, draws: Draws) -> torch.Tensor:
    """Return ``t (1 + epsilon U[-1, 1])`` in float64, element by element; infinities (of attention masks) stay.

    Tensors of integers stay as they are.
    """
    if not tensor.is_floating_point():
        return lift_tensor(tensor)
    flat = tensor.reshape(-1)
    moved = lift_tensor(flat[:0]).new_empty(flat.shape)
    for place in pieces(flat):
        here = lift_tensor(flat[place])
        noise = torch.rand(here.shape, **draws.on(here.device), dtype=torch.float64).mul_(2).sub_(1)
        near = here + here * noise.to(here.dtype) * epsilon
        moved[place] = torch.where(near.isfinite(), near, here)
    return moved.view(tensor.shape)
