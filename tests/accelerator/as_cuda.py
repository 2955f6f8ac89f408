"""What float64 kernels and fused ones of CUDA do otherwise than the CPU's, for the emulated device.

Each is read off CUDA's source and was met on a real GPU, where it made right models fail or stay open.
"""

from __future__ import annotations

import math
import warnings

import torch

#: ``1.0f / 6.0f``: the constant of CUDA's hardswish and hardsigmoid, in float64 kernels too.
SIXTH = float(torch.tensor(1.0, dtype=torch.float32) / 6)


def native_dropout(x: torch.Tensor, p: float, train: bool | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Drop by a mask that is not what ``bernoulli_`` draws from the same state, nor the same in another dtype."""
    if train is False or p == 0:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    keep = 1 - p
    mask = torch.rand_like(x, dtype=torch.float64 if x.dtype is torch.float64 else torch.float32) < keep
    return x * mask * (1 / keep if keep else 0.0), mask


def hardsigmoid(x: torch.Tensor) -> torch.Tensor:
    """Return ``min(max(x + 3, 0), 6)`` times float32's 1/6."""
    return (x + 3).clamp(0, 6) * (SIXTH if x.dtype is torch.float64 else 1 / 6)


def hardswish(x: torch.Tensor) -> torch.Tensor:
    """Return ``x min(max(x + 3, 0), 6)`` times float32's 1/6."""
    return x * hardsigmoid(x)


def weight_norm(v: torch.Tensor, g: torch.Tensor, dim: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``v g / ||v||`` and the norms, whose root is float32's (``sqrtf``)."""
    others = [d for d in range(v.dim()) if d != dim % v.dim()]
    norms = v.square().sum(others, keepdim=True).to(torch.float32).sqrt().to(v.dtype)
    return v * (g / norms), norms


def install() -> torch.library.Library:
    """Give the kernels to the device, whose backend has its name already; they stay as long as what is returned."""
    library = torch.library.Library("aten", "IMPL", "PrivateUse1")
    warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
    assert math.isclose(SIXTH, 1 / 6, rel_tol=1e-7)
    library.impl("native_dropout", native_dropout)
    library.impl("_weight_norm_interface", weight_norm)
    for name, function in (("hardsigmoid", hardsigmoid), ("hardswish", hardswish)):

        def in_place(x: torch.Tensor, function=function) -> torch.Tensor:  # type: ignore[no-untyped-def]
            return x.copy_(function(x))

        def out(x: torch.Tensor, *, out: torch.Tensor, function=function) -> torch.Tensor:  # type: ignore[no-untyped-def]
            return out.copy_(function(x))

        library.impl(name, function, allow_override=True)
        library.impl(f"{name}_", in_place, allow_override=True)
        library.impl(f"{name}.out", out, allow_override=True)
    return library
