"""Modules and optimizers of `torch.testing`'s own databases, as subjects of an audit."""

from __future__ import annotations

import sys
import types
import unittest
from typing import Any

import torch
from torch import nn

from benchmarks.models.correct import classes
from benchmarks.models.subjects import Made, Subjects, adamw


def _without_test_packages() -> None:
    """Let torch's databases be imported where the packages of its own tests are not installed."""
    try:
        import expecttest  # noqa: F401
    except ImportError:
        stand_in: Any = types.ModuleType("expecttest")
        stand_in.TestCase = unittest.TestCase
        sys.modules["expecttest"] = stand_in


#: Inputs a module, evenly over those of the database: one loss of it has 857, half of all.
INPUTS = 8


def modules() -> Subjects:
    """Every module of torch's own database that has a parameter and a floating result, on some of its inputs."""
    _without_test_packages()
    from torch.testing._internal.common_modules import module_db

    for info in module_db:
        if "jit" in info.name or "Lazy" in info.name:
            continue
        try:
            inputs = info.module_inputs_func(
                info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
            )  # fmt: skip
        except Exception:
            continue
        for i in sorted({round(k * (len(inputs) - 1) / (INPUTS - 1)) for k in range(INPUTS)} if inputs else ()):
            given = inputs[i]
            if given.forward_input is not None:
                yield f"{info.name}-{i}", lambda info=info, given=given: _wrapped(info, given)


class _Wrapped(nn.Module):
    """A module with a linear layer before it, that there be something to train, and its arguments."""

    def __init__(self, inner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.inner, self.args, self.kwargs = inner, args, kwargs
        first = args[0]
        self.scale = (
            nn.Parameter(torch.ones(first.shape[-1] if first.dim() else 1)) if first.is_floating_point() else None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given = x if self.scale is None else x * self.scale
        out = self.inner(given, *self.args[1:], **self.kwargs)
        out = out[0] if isinstance(out, (tuple, list)) else out
        return out.reshape(-1) if out.is_floating_point() else x.new_zeros(1)


def _mean_of_squares(model: nn.Module, batch: Any) -> torch.Tensor:
    return (model(batch["x"]) + 0.3).square().mean()


def _wrapped(info: Any, given: Any) -> Made:
    inner = info.module_cls(*given.constructor_input.args, **given.constructor_input.kwargs)
    args = given.forward_input.args
    model = _Wrapped(inner, args, given.forward_input.kwargs)
    if not any(p.requires_grad for p in model.parameters()):
        raise NotImplementedError("nothing to train")
    return model, {"x": args[0]}, _mean_of_squares, adamw(model)


def optimizers() -> Subjects:
    """Every configuration of torch's own database of optimizers, on an MLP."""
    _without_test_packages()
    from torch.testing._internal.common_optimizers import optim_db

    for info in optim_db:
        for i, given in enumerate(info.optim_inputs_func(device="cpu")):

            def made(info: Any = info, given: Any = given) -> Made:
                model: nn.Module
                loss = "cross_entropy"
                if info.optim_cls is torch.optim.SparseAdam:
                    model = nn.Sequential(nn.EmbeddingBag(23, 3, sparse=True))
                    batch = {"x": torch.randint(0, 23, (16, 5)), "y": torch.randint(0, 3, (16,))}
                elif info.optim_cls is torch.optim.Muon:  # for hidden matrices alone, as torch documents it
                    hidden = [nn.Linear(12, 12, False) for _ in range(3)]
                    model = nn.Sequential(hidden[0], nn.Tanh(), hidden[1], nn.Tanh(), hidden[2])
                    batch = {"x": torch.randn(64, 12), "y": torch.randn(64, 12)}
                    loss = "mse_loss"
                else:
                    first, middle, last = nn.Linear(8, 12, False), nn.Linear(12, 12, False), nn.Linear(12, 3, False)
                    model, batch = nn.Sequential(first, nn.Tanh(), middle, nn.Tanh(), last), classes()
                kwargs = {k: v for k, v in given.kwargs.items() if k not in ("differentiable", "capturable")}
                return model, batch, loss, info.optim_cls(list(model.parameters()), **kwargs)

            yield f"{info.optim_cls.__name__}-{i} {given.desc}", made
