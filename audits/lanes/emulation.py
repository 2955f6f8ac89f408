"""Operators without a float64 kernel, or without one that computes in float64, written out in those that have one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from audits.lanes.kinks.fake_quantization import EMULATED
from audits.lanes.lifting import traits


def grouped_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Return the products of `torch.nn.functional.grouped_mm`, one plain product per group.

    Args:
        a: ``(G, M, K)``, or ``(M, K)`` whose rows (b has three dimensions) or columns (b has two) are grouped.
        b: ``(G, K, N)``, or ``(K, N)`` whose columns (a has three dimensions) or rows (a has two) are grouped.
        offs: the groups' ends along the grouped dimension; None where both have three dimensions.
        bias: not supported by torch's kernel either.
        out_dtype: dtype of the result.

    Returns:
        ``(G, M, N)`` where nothing or the inner dimension is grouped, else ``(M, N)``.
    """
    assert bias is None, "grouped_mm takes no bias yet"
    dtype = out_dtype or a.dtype
    if offs is None:
        return torch.bmm(a, b).to(dtype)
    ends = offs.tolist()
    starts = [0, *ends[:-1]]
    if a.dim() == 2 and b.dim() == 2:
        return torch.stack([a[:, i:j] @ b[i:j] for i, j in zip(starts, ends, strict=True)]).to(dtype)
    rows, columns = a.shape[-2], b.shape[-1]
    result = torch.zeros(rows, columns, dtype=a.dtype, device=a.device)
    for group, (i, j) in enumerate(zip(starts, ends, strict=True)):
        if b.dim() == 3:
            result[i:j] = a[i:j] @ b[group]
        else:
            result[:, i:j] = a[group] @ b[:, i:j]
    return result.to(dtype)


def weight_norm(v: torch.Tensor, g: torch.Tensor, dim: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``v g / ||v||`` and the norms over all dimensions but the first or the last.

    CUDA's float64 kernel takes the root in float32 (``sqrtf`` in ``WeightNorm.cu``): a staircase of 6e-8, under which
    no small step finds a derivative.

    Args:
        v: the direction.
        g: the lengths, of size 1 in all dimensions but ``dim``.
        dim: the dimension that is kept, the first or the last.
    """
    others = [d for d in range(v.dim()) if d != dim % v.dim()]
    norms = torch.linalg.vector_norm(v, dim=others, keepdim=True) if others else v.abs()
    return v * (g / norms), norms


_EMULATED: dict[str, Callable[..., Any]] = {"aten::_grouped_mm": grouped_mm, **EMULATED}

#: Written out on every device but the CPU, whose kernel computes in what its arguments have.
_EMULATED_ELSEWHERE: dict[str, Callable[..., Any]] = {"aten::_weight_norm_interface": weight_norm}


def is_emulated(name: str) -> bool:
    """Whether an operator of this functional name is written out in float64."""
    return f"aten::{name}" in _EMULATED


def emulation(func: Any, args: tuple[Any, ...]) -> Callable[..., Any] | None:
    """Return what to call instead of an operator that has no kernel for its float64 arguments, None where it has."""
    name = traits(func).name
    emulated, elsewhere = _EMULATED.get(name), _EMULATED_ELSEWHERE.get(name)
    if emulated is None and elsewhere is None:
        return None
    lifted = [a for a in args if isinstance(a, torch.Tensor) and a.dtype is torch.float64]
    if elsewhere is not None and any(a.device.type != "cpu" for a in lifted):
        return elsewhere
    return emulated if lifted else None


class Emulating(TorchDispatchMode):
    """Run what is inside the block, emulated where it has to be, in the backward too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator, emulated where it has to be."""
    return (emulation(func, args) or func)(*args, **kwargs)
