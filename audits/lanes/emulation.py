"""Operators that torch has no float64 kernel for, written out in operators that have one."""

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


_EMULATED: dict[str, Callable[..., Any]] = {"aten::_grouped_mm": grouped_mm, **EMULATED}


def is_emulated(name: str) -> bool:
    """Whether an operator of this functional name is written out in float64."""
    return f"aten::{name}" in _EMULATED


def emulation(func: Any, args: tuple[Any, ...]) -> Callable[..., Any] | None:
    """Return what to call instead of an operator that has no kernel for its float64 arguments, None where it has."""
    emulated = _EMULATED.get(traits(func).name)
    if emulated is None or not any(isinstance(a, torch.Tensor) and a.dtype is torch.float64 for a in args):
        return None
    return emulated


class Emulating(TorchDispatchMode):
    """Run what is inside the block, emulated where it has to be, in the backward too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator, emulated where it has to be."""
    return (emulation(func, args) or func)(*args, **kwargs)
