"""CUDA's optimizer kernels and capturable paths on a CPU, for builds of torch's own classes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

#: ``(scalars) -> scalars``: what a faulty kernel makes of lr, beta1, beta2, weight_decay, eps.
Fault = Callable[[dict[str, float]], dict[str, float]]


def adam_math(
    decoupled: bool, single: bool, fault: Fault | None, param: torch.Tensor, grad: torch.Tensor, m: torch.Tensor,
    v: torch.Tensor, largest: torch.Tensor | None, step: torch.Tensor, scalars: dict[str, float], maximize: bool,
) -> None:  # fmt: skip
    """One tensor as CUDA's ``adam_math`` has it.

    Arithmetic in float32 (float64 for float64 weights), the betas and all that is made of them too; ``single`` False is
    the kernel of older builds, whose betas were doubles.
    """
    if fault is not None:
        scalars = fault(scalars)
    wide = torch.float64 if param.dtype is torch.float64 else torch.float32
    scalar = wide if single else torch.float64

    def number(value: float) -> torch.Tensor:
        return torch.tensor(value, dtype=scalar)

    lr, b1, b2, decay, eps = (number(scalars[k]) for k in ("lr", "beta1", "beta2", "weight_decay", "eps"))
    t = step.to(scalar)
    p, g, first, second = (x.to(wide) for x in (param, grad, m, v))
    if maximize:
        g = -g
    if decay:
        if decoupled:
            p = p - lr.to(wide) * decay.to(wide) * p
        else:
            g = g + p * decay.to(wide)
    # fma(beta, m, fma(-beta, g, g)): beta itself is rounded, one minus it is not
    first = (b1.double() * first.double() + (1 - b1.double()) * g.double()).to(wide)
    second = (b2.double() * second.double() + (1 - b2.double()) * (g * g).double()).to(wide)
    correction1 = (1 - torch.pow(b1, t)).to(wide)
    root = torch.sqrt(1 - torch.pow(b2, t)).to(wide)
    used = second
    if largest is not None:
        used = torch.maximum(largest.to(wide), second)
        largest.copy_(used)
    p = p - (lr.to(wide) / correction1) * first / (used.sqrt() / root + eps.to(wide))
    for kept, value in ((param, p), (m, first), (v, second)):
        kept.copy_(value)


def use_cuda_fused_adam(monkeypatch: pytest.MonkeyPatch, *, single: bool = True, fault: Fault | None = None) -> None:
    """Let ``Adam(fused=True)`` and ``AdamW(fused=True)`` run the emulated kernel."""

    def kernel(decoupled: bool) -> Callable[..., None]:
        def run(params: Any, grads: Any, ms: Any, vs: Any, largest: Any, steps: Any, *, amsgrad: bool, lr: Any,
                beta1: float, beta2: float, weight_decay: float, eps: float, maximize: bool, grad_scale: Any = None,
                found_inf: Any = None) -> None:  # fmt: skip
            assert grad_scale is None
            assert found_inf is None
            scalars = {"lr": float(lr), "beta1": beta1, "beta2": beta2, "weight_decay": weight_decay, "eps": eps}
            for i, param in enumerate(params):
                adam_math(decoupled, single, fault, param, grads[i], ms[i], vs[i], largest[i] if amsgrad else None,
                          steps[i], scalars, maximize)  # fmt: skip

        return run

    monkeypatch.setattr(torch, "_fused_adam_", kernel(False))
    monkeypatch.setattr(torch, "_fused_adamw_", kernel(True))


def allow_capturable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let capturable optimizers run on a CPU."""
    for name, module in list(sys.modules.items()):
        if name.startswith("torch.optim.") and hasattr(module, "_get_capturable_supported_devices"):
            monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda supports_xla=True: ["cpu", "cuda"])
