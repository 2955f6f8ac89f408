"""RMSNorm in NumPy's float32: a kernel that no tensor mode can lift, on every machine."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

EPS = np.float32(1e-6)


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().to("cpu", torch.float32).numpy()


def _tensor(array: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)).to(like.device, like.dtype)


def rms_function(coupling: float = 1.0, forgotten: int = 0) -> type[torch.autograd.Function]:
    """Return the Function; wrong unless the coupling is whole and no column forgotten."""

    class NumpyRms(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x, weight)
            values = _array(x)
            root = 1 / np.sqrt(np.square(values).mean(-1, keepdims=True, dtype=np.float32) + EPS)
            return _tensor(values * root * _array(weight), x)

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
            x, weight = ctx.saved_tensors
            values, arriving = _array(x), _array(gradient)
            root = 1 / np.sqrt(np.square(values).mean(-1, keepdims=True, dtype=np.float32) + EPS)
            normal, wanted = values * root, arriving * _array(weight)
            mean = (wanted * normal).mean(-1, keepdims=True, dtype=np.float32)
            dx = root * (wanted - np.float32(coupling) * normal * mean)
            if forgotten:
                dx[..., -forgotten:] = 0
            dw = (arriving * normal).reshape(-1, values.shape[-1]).sum(0, dtype=np.float32)
            return _tensor(dx, x), _tensor(dw, weight)

    return NumpyRms
