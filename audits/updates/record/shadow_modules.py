"""Modules that follow another one: EMA shadows, declared or found as torch's `AveragedModel`."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from audits.live.subject import Subject


@dataclass(frozen=True)
class Shadow:
    """A module that follows another one.

    Attributes:
        prefix: of the shadow's tensors, with its dot.
        source: prefix of the tensors that it follows.
        decay: None for an equal average.
        declared: by ``expect["ema"]``; otherwise an `AveragedModel` that was found.
        buffers: how its buffers are declared to follow: copied, averaged, left; None where either is right.
        lagging: it is declared to follow the weights from before the step, as MoCo's key encoder does.
    """

    prefix: str
    source: str
    decay: float | None
    declared: bool
    buffers: str | None = None
    lagging: bool = False

    def pairs(self, names: dict[str, torch.Tensor]) -> list[tuple[str, str]]:
        """Return (tensor of the shadow, tensor that it follows)."""
        found = ((name, self.source + name[len(self.prefix) :]) for name in names if name.startswith(self.prefix))
        return [(shadow, weight) for shadow, weight in found if weight in names]

    def keep(self, subject: Subject, before: dict[str, torch.Tensor]) -> float:
        """Return the share of itself that an averaged tensor keeps in this step."""
        if averaged_at(subject.model, self.prefix) is None:
            return self.decay if self.decay is not None else 0.0
        count = int(before[self.prefix.removesuffix("module.") + "n_averaged"])
        if not count:
            return 0.0  # an `AveragedModel` copies the first time, then averages equally or with its decay
        return count / (count + 1.0) if self.decay is None else self.decay


def averaged_at(model: nn.Module, prefix: str) -> AveragedModel | None:
    """Return torch's `AveragedModel` whose tensors have this prefix."""
    modules = dict(model.named_modules())
    found = modules.get(prefix.removesuffix(".").removesuffix(".module"))
    return found if isinstance(found, AveragedModel) else None


def shadows_of(subject: Subject) -> list[Shadow]:
    """Return the shadows that are declared, and the `AveragedModel` whose source and decay are plain."""
    found: list[Shadow] = []
    declared = subject.recipe.expect.get("ema") or {}
    for prefix, what in declared.items() if isinstance(declared, dict) else ():
        if isinstance(what, dict):
            shadow = _dotted(prefix)
            if not shadow.endswith("module.") and averaged_at(subject.model, shadow) is not None:
                shadow += "module."
            decay = what.get("decay")
            found.append(Shadow(shadow, _dotted(str(what.get("source", ""))), None if decay is None else float(decay),
                                True, what.get("buffers"), what.get("when") == "before"))  # fmt: skip
    known = {shadow.prefix for shadow in found}
    for path, module in subject.model.named_modules():
        inner = f"{path}.module."
        if path and isinstance(module, AveragedModel) and inner not in known:
            plain, decay = _plain_average(module)
            source = _source_of(subject.model, path, module) if plain else None
            if source:
                found.append(Shadow(inner, source, decay, False))
    return found


def _plain_average(averaged: AveragedModel) -> tuple[bool, float | None]:
    """Whether the average is one of torch's own, and its decay (None for an equal average)."""
    given: Any = averaged.multi_avg_fn or averaged.avg_fn
    if given is None:
        return True, None
    name = getattr(given, "__qualname__", "")
    if getattr(given, "__module__", "") != AveragedModel.__module__ or "get_ema_" not in name:
        return "get_swa_" in name, None
    decay = inspect.getclosurevars(inspect.unwrap(given)).nonlocals.get("decay")
    return decay is not None, decay


def _source_of(model: nn.Module, path: str, averaged: AveragedModel) -> str | None:
    """The module of the same class and shapes that an `AveragedModel` follows, when there is just one."""
    shapes = [(n, p.shape) for n, p in averaged.module.named_parameters()]
    twins = [
        name
        for name, module in model.named_modules()
        if name and type(module) is type(averaged.module) and not f"{name}.".startswith(f"{path}.")
        and [(n, p.shape) for n, p in module.named_parameters()] == shapes
    ]  # fmt: skip
    return f"{twins[0]}." if len(twins) == 1 else None


def _dotted(prefix: str) -> str:
    prefix = prefix.removesuffix("*")
    return prefix if not prefix or prefix.endswith(".") else f"{prefix}."


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return clones of all parameters and buffers by name."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}
