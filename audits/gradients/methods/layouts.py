"""The memory layout a gradient arrives in: a narrow view after `torch.cat`, an expanded one after `sum`.

A Function's backward that reads its gradient as if it were contiguous is wrong for these alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

#: Elements of a buffer that a cotangent is laid out in, at most (256 MiB in float64).
BUFFER = 2**25


@dataclass(frozen=True)
class Layout:
    """Shape, strides and offset of a gradient."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Layout | None:
        """Return a tensor's layout, None where it is plainly contiguous, or where it overlaps in an odd way."""
        if tensor.layout is not torch.strided or not tensor.numel():
            return None
        found = cls(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))
        plain = tensor.is_contiguous() and not found.offset
        return None if plain or found._extent() > BUFFER or found._overlaps() else found

    def lay_out(self, values: torch.Tensor) -> torch.Tensor:
        """Return the values in this layout; where it repeats one number along a dimension, the first is repeated."""
        for dimension, stride in enumerate(self.strides):
            if stride == 0:
                values = values.narrow(dimension, 0, 1)
        buffer = values.new_zeros(self._extent())
        buffer.as_strided(values.shape, self.strides, self.offset).copy_(values)
        return buffer.as_strided(self.shape, self.strides, self.offset)

    def _extent(self) -> int:
        return self.offset + 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))

    def _overlaps(self) -> bool:
        reached = 0
        for stride, size in sorted(zip(self.strides, self.shape, strict=True)):
            if stride and size > 1:
                if stride <= reached:
                    return True
                reached += (size - 1) * stride
        return False


class _CotangentSum(torch.autograd.Function):
    """``sum(output * cotangent)``, whose backward hands the cotangent over as it lies in memory."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, cotangent: torch.Tensor) -> torch.Tensor:
        ctx.cotangent = cotangent
        return (output * cotangent).sum()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        cotangent = ctx.cotangent
        return (cotangent if bool(gradient == 1) else cotangent * gradient), None


def cotangent_sum(output: torch.Tensor, cotangent: torch.Tensor) -> torch.Tensor:
    """Return ``sum(output * cotangent)``; a cotangent in a layout of its own arrives in it.

    Args:
        output: a Function's output, real or complex.
        cotangent: of its shape and dtype.
    """
    if Layout.of(cotangent) is None or output.is_complex():
        return (output * cotangent).sum()
    return _CotangentSum.apply(output, cotangent)  # type: ignore[no-untyped-call, no-any-return]
