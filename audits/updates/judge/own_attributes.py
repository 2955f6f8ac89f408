"""What an optimizer keeps as plain attributes of its own, beside its groups: ``self.maximize``, ``self.pre_norm``."""

from __future__ import annotations

import types
import weakref
from collections.abc import Mapping
from typing import Any

import torch

from audits.live.subject import LivePhase
from audits.recipe.constructing import mould_of_recipe, optimizer_class

_KNOWN: weakref.WeakKeyDictionary[LivePhase, dict[str, Any]] = weakref.WeakKeyDictionary()

#: Attributes of `torch.optim.Optimizer` itself.
_TORCHS = ("defaults", "state", "param_groups")


def attributes_of(phase: LivePhase) -> Mapping[str, Any]:
    """Return the plain attributes of a phase's optimizer, functions among them; none for torch's classes and kin.

    torch's classes have all their options in their groups, and there they are read.
    """
    cls = optimizer_class(phase.recipe.optimizer)
    if any(getattr(torch.optim, c.__name__, None) is c for c in cls.__mro__ if c is not torch.optim.Optimizer):
        return {}
    if phase not in _KNOWN:
        found = vars(phase.build_optimizer(with_state=False))
        _KNOWN[phase] = {k: v for k, v in found.items() if k not in _TORCHS and _plain(v)}
    return _KNOWN[phase]


def shared_state(phase: LivePhase) -> Mapping[str, torch.Tensor]:
    """Return the single numbers that a captured optimizer keeps in ``state`` under no tensor: MADGRAD's count ``k``."""
    mould = mould_of_recipe(phase.recipe.optimizer)
    return {} if mould is None else shared_of(mould)


def shared_of(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the single numbers in an optimizer's ``state`` that belong to no tensor, by name."""
    entries: dict[Any, Any] = dict(optimizer.state)  # torch's annotation knows only tensors as keys
    return {
        key: torch.as_tensor(value).detach().reshape(())
        for key, value in entries.items()
        if isinstance(key, str)
        and ((isinstance(value, torch.Tensor) and value.numel() == 1) or type(value) in (int, float))
    }


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype, types.FunctionType))
