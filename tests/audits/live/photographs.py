"""Everything of a model, of the user's optimizer and of the process that an audit could change, seen from outside.

Written without the code under test: whatever is reachable is described by what it is (identity) and what it holds.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device)


def photograph(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Return path -> what was there."""
    found: dict[str, Any] = {}
    alive: list[Any] = []  # objects stay alive, so that no identity is used twice
    _describe("model", model, found, set(), alive, 0)
    for name, parameter in model.named_parameters():
        for kind in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            found[f"{name}.{kind}"] = list(getattr(parameter, kind) or {})
    for base in {base for module in model.modules() for base in type(module).__mro__}:
        if not base.__module__.startswith(("torch.", "builtins")):
            for name, value in vars(base).items():
                if isinstance(value, (dict, list, set)) and not name.startswith("__"):
                    _describe(f"class {base.__qualname__}.{name}", value, found, set(), alive, 0)
    if optimizer is not None:
        _describe("optimizer", vars(optimizer), found, {id(p) for p in model.parameters()}, alive, 0)
    found["torch's generator"] = torch.get_rng_state().tolist()
    found["numpy's generator"] = [np.random.get_state()[1].tolist(), *np.random.get_state()[2:]]
    found["python's generator"] = random.getstate()
    found["process"] = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"),
                        torch.are_deterministic_algorithms_enabled(),
                        torch.autograd.Function.apply.__func__,
                        vars(torch.autograd.function._SingleLevelFunction).get("apply"))  # fmt: skip
    found["alive"] = _Unequal(alive)
    return found


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return the paths at which two photographs differ."""
    paths = [path for path in dict.fromkeys([*before, *after]) if path != "alive"]
    return [p for p in paths if p not in before or p not in after or not _equal(before[p], after[p])]


class _Unequal:
    def __init__(self, alive: list[Any]) -> None:
        self.alive = alive


def _describe(path: str, value: Any, found: dict[str, Any], seen: set[int], alive: list[Any], depth: int) -> None:
    alive.append(value)
    if isinstance(value, _PLAIN):
        found[path] = value
        return
    found[path] = (type(value), id(value))
    if id(value) in seen or depth > 9:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        found[f"{path} holds"] = _tensor(value)
    elif isinstance(value, np.ndarray):
        found[f"{path} holds"] = value.tolist()
    elif isinstance(value, torch.Generator):
        found[f"{path} stands"] = value.get_state().tolist()
    elif isinstance(value, np.random.Generator):
        found[f"{path} stands"] = repr(value.bit_generator.state)
    elif isinstance(value, random.Random):
        found[f"{path} stands"] = value.getstate()
    elif isinstance(value, torch.jit.ScriptModule):
        found[f"{path} is in mode"] = value.training
        for name, tensor in (*value.named_parameters(), *value.named_buffers()):
            _describe(f"{path}.{name}", tensor, found, seen, alive, depth + 1)
    elif isinstance(value, Mapping):
        found[f"{path} has keys"] = [repr(key) for key in value]
        for key, item in value.items():
            _describe(f"{path}[{key!r}]" if isinstance(key, (str, int)) else f"{path}[{id(key)}]", item, found, seen,
                      alive, depth + 1)  # fmt: skip
    elif isinstance(value, (list, tuple, deque, set)):
        found[f"{path} has items"] = len(value)
        for place, item in enumerate(value):
            _describe(f"{path}[{place}]", item, found, seen, alive, depth + 1)
    elif isinstance(value, nn.Module) or type(value).__module__.startswith("tests."):
        slots = {n: getattr(value, n) for base in type(value).__mro__ for n in vars(base).get("__slots__", ())
                 if n[:2] != "__" and hasattr(value, n)}  # fmt: skip
        entries = {**getattr(value, "__dict__", {}), **slots}
        found[f"{path} has"] = sorted(entries)
        for name, item in entries.items():
            _describe(f"{path}.{name}", item, found, seen, alive, depth + 1)


def _tensor(tensor: torch.Tensor) -> dict[str, Any]:
    plain = tensor.layout is torch.strided and not tensor.is_meta
    return {
        "dtype": tensor.dtype,
        "shape": tuple(tensor.shape),
        "place": (tensor.data_ptr(), tensor.untyped_storage().data_ptr(), tensor.stride()) if plain else None,
        "leaf": tensor.is_leaf,
        "requires_grad": tensor.requires_grad,
        "grad": id(tensor.grad) if tensor.is_leaf and tensor.grad is not None else None,
        "values": None if tensor.is_meta else tensor.detach().to_dense().clone(),
        "gradient": tensor.grad.clone() if tensor.is_leaf and tensor.grad is not None else None,
    }


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[k], other[k]) for k in one)
    return type(one) is type(other) and bool(one == other)
