"""RMSNorm in Triton: float32 inside, whatever comes in, as Liger's and most others' kernels are."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def _forward(x, weight, y, inverse, stride, width, eps, block: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, block)
    inside = columns < width
    values = tl.load(x + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    root = 1.0 / tl.sqrt(tl.sum(values * values, axis=0) / width + eps)
    tl.store(inverse + row, root)
    tl.store(y + row * stride + columns, values * root * scale, mask=inside)


@triton.jit
def _backward(x, weight, gradient, inverse, dx, dw, stride, width, coupling, columns_done, block: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, block)
    inside = columns < width
    values = tl.load(x + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    arriving = tl.load(gradient + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    root = tl.load(inverse + row)
    normal = values * root
    wanted = arriving * scale
    mean = tl.sum(wanted * normal, axis=0) / width
    result = root * (wanted - coupling * normal * mean)
    result = tl.where(columns < columns_done, result, 0.0)
    tl.store(dx + row * stride + columns, result, mask=inside)
    tl.store(dw + row * width + columns, arriving * normal, mask=inside)


class TritonRms(torch.autograd.Function):
    """``y = x / sqrt(mean(x^2) + eps) * w`` over the last dimension."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return _run_forward(ctx, x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return _run_backward(ctx, gradient, 1.0, 0)


def _run_forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    rows = x.contiguous().view(-1, x.shape[-1])
    y = torch.empty_like(rows)
    inverse = torch.empty(rows.shape[0], dtype=torch.float32, device=x.device)
    width = rows.shape[1]
    _forward[(rows.shape[0],)](rows, weight, y, inverse, rows.stride(0), width, 1e-6,
                               block=triton.next_power_of_2(width))  # fmt: skip
    ctx.save_for_backward(rows, weight, inverse)
    ctx.shape = x.shape
    return y.view(x.shape)


def _run_backward(ctx: Any, gradient: torch.Tensor, coupling: float, forgotten: int) -> tuple[torch.Tensor, ...]:
    rows, weight, inverse = ctx.saved_tensors
    arriving = gradient.contiguous().view(rows.shape)
    dx = torch.empty_like(rows)
    dw = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    width = rows.shape[1]
    _backward[(rows.shape[0],)](rows, weight, arriving, inverse, dx, dw, rows.stride(0), width, coupling,
                                width - forgotten, block=triton.next_power_of_2(width))  # fmt: skip
    return dx.view(ctx.shape), dw.sum(0).to(weight.dtype)


def wrong_rms(coupling: float, forgotten: int) -> type[torch.autograd.Function]:
    """Return the Function with another factor on its coupling, or with columns forgotten."""

    class WrongTritonRms(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return _run_forward(ctx, x, weight)

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return _run_backward(ctx, gradient, coupling, forgotten)

    return WrongTritonRms
