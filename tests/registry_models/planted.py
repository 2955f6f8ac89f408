"""One small model with one planted fault at a time, for every artifact kind."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from audits import Recipe


@dataclass(frozen=True)
class Fault:
    """A fault, the check that should name it, and whether an exported graph cannot have it any more."""

    name: str
    text: str
    expected: str
    lost_by_export: bool = False


FAULTS = (
    Fault("none", "none", ""),
    Fault("backward", "a custom `autograd.Function` whose backward is wrong by a factor of 2", "gradient.", True),
    Fault("hook", "a hook that halves one gradient", "gradient.", True),
    Fault("detached", "a branch that is detached by mistake", "gradient."),
    Fault("data", "a value taken out of the graph with `.data`", "gradient."),
    Fault("missing", "a parameter that the optimizer lacks", "registration."),
    Fault("stale", "an optimizer built before the layer was replaced", "registration."),
    Fault("duplicate", "a parameter in two param groups", "registration."),
    Fault("decay", "weight decay on biases, meant to be 0", "registration."),
    Fault("rate", "another learning rate than was meant", "registration."),
    Fault("frozen", "a backbone that was meant to be frozen and is not", "registration."),
    Fault("untied", "two weights that were tied when the recipe was captured and no longer are", "registration."),
)


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return torch.tanh(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return 2 * gradient * (1 - torch.tanh(x) ** 2)


class _Right(_Doubled):
    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return 0.5 * _Doubled.backward(ctx, gradient)


def _halve(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """A forward hook that changes the gradient and not the value."""
    if output.requires_grad:
        output.register_hook(lambda gradient: 0.5 * gradient)
    return output


class Planted(nn.Module):
    """Two tied layers, a norm, dropout, an own activation and a head; ``fault`` says what is wrong with it."""

    def __init__(self, fault: str = "none") -> None:
        super().__init__()
        self.fault = fault
        self.backbone = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.second = nn.Linear(4, 4)
        if fault != "untied":
            self.second.weight = self.backbone.weight
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(4, 2)
        if fault == "hook":
            self.second.register_forward_hook(_halve)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        activation = _Doubled if self.fault == "backward" else _Right
        hidden = activation.apply(self.norm(self.backbone(x)))
        side = self.second(hidden)
        if self.fault == "detached":
            side = side.detach() + 0.1 * hidden
        scale = self.head.bias.data.mean() if self.fault == "data" else self.head.bias.mean()
        return self.head(self.dropout(side + hidden)) * (1 + scale)  # type: ignore[no-any-return]


def build(fault: str = "none") -> Planted:
    """The factory."""
    return Planted(fault)


def batch() -> dict[str, torch.Tensor]:
    """Eight rows, always the same."""
    generator = torch.Generator().manual_seed(1)
    return {"inputs": torch.randn(8, 4, generator=generator), "targets": torch.randint(0, 2, (8,), generator=generator)}


def optimizer_of(model: Planted) -> torch.optim.Optimizer:
    """AdamW without decay on biases, with the fault that is in the optimizer."""
    named = dict(model.named_parameters())
    if model.fault == "missing":
        named.pop("head.weight")
    if model.fault == "stale":
        named["head.weight"] = nn.Parameter(named["head.weight"].detach().clone())
    plain = [p for n, p in named.items() if n.endswith("bias") and model.fault != "decay"]
    decayed = [p for n, p in named.items() if not n.endswith("bias") or model.fault == "decay"]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": 0.1}]
    if plain:
        groups.append({"params": plain, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=3e-3 if model.fault == "rate" else 1e-3)
    if model.fault == "duplicate":
        optimizer.param_groups[-1]["params"] = [*optimizer.param_groups[-1]["params"], model.head.weight]
    return optimizer


def expectations(fault: str, prefix: str = "") -> dict[str, Any]:
    """What was meant, the same for every fault."""
    meant: dict[str, Any] = {
        "optimizer": "AdamW",
        "lr": 1e-3,
        "weight_decay": {"*.bias": 0.0, "*": 0.1},
    }
    return {**meant, "frozen": [f"{prefix}backbone.bias"]} if fault == "frozen" else meant


def recipe(model: Planted, fault: str) -> Recipe:
    """Captured as a training script would."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Recipe.capture(
            model, batch=batch(), loss="cross_entropy", optimizer=optimizer_of(model), expect=expectations(fault)
        )
