"""What a value holds, remembered in depth and put back: tensors, containers, generators, objects, modules.

Compared by identity alone (``==`` of tensors is no truth value): an entry that still is the very object it was stays,
what is new goes, and the object that was there before returns with the value that it had.
"""

from __future__ import annotations

import enum
import functools
import logging
import pathlib
import random
import threading
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from audits.live.kept import (
    MISSING,
    NO_NAMES,
    ArrayState,
    Attributes,
    Called,
    Entries,
    Items,
    ModuleEntries,
    ScriptAttributes,
    TensorState,
    slots_of,
)

#: Entries beyond which a container's own entries are put back but not looked into: a replay buffer of 1e5 transitions
#: would cost 0.1 s before every single evaluation of the loss.
LARGE = 10_000

#: Objects inside objects that are entered: a cache of layers of tensors is two; a trainer's data lies deeper.
OBJECT_DEPTH = 2

#: Never entered: they cannot change, or are the process's own and not the model's.
_OPAQUE = (
    bool, int, float, complex, str, bytes, type(None), type(...), type, range, slice, enum.Enum, weakref.ref,
    types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial,
    torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format, torch.jit.ScriptFunction,
    logging.Logger, threading.Thread, np.memmap, np.generic, pathlib.PurePath, weakref.WeakSet,
    weakref.WeakKeyDictionary, weakref.WeakValueDictionary, UninitializedTensorMixin,
)  # fmt: skip


class Kept(Protocol):
    """Something whose state is remembered."""

    def restore(self) -> None:
        """Put the state back."""


class Memory:
    """The state of everything that a model's modules reach.

    Args:
        model: the model; its parameters' values are left alone (training moves them), but which parameter is
            registered under which name is put back. Modules that it merely holds, in a list say, come with theirs.
        hooks: put back the modules' hooks as well. Not while somebody listens: the listener's hooks would be removed.
    """

    def __init__(self, model: nn.Module, *, hooks: bool = False) -> None:
        self.with_hooks = hooks
        self.tensors: list[torch.Tensor] = []
        self._kept: list[Kept] = []
        self._seen: dict[int, Any] = {}  # holds the objects too, so that no id is used twice
        pending = deque(self._registered(model))
        while pending:
            value, depth = pending.popleft()
            if id(value) in self._seen:
                continue
            keep = _keeper(type(value))  # type: ignore[arg-type]
            if keep is not None:
                pending.extend(keep(self, value, depth))

    def restore(self) -> None:
        """Put everything back; what cannot be put back does not keep the rest from it.

        Raises:
            Exception: the first that came up, when all else is back.
        """
        first: Exception | None = None
        for kept in self._kept:
            try:
                kept.restore()
            except Exception as error:
                first = first or error
        if first is not None:
            raise first

    def _registered(self, root: nn.Module) -> list[tuple[Any, int]]:
        """Remember the tree of modules; its parameters are seen, and so left alone, before any value is."""
        found: list[tuple[Any, int]] = []
        tree, seen = [root], self._seen
        while tree:
            module = tree.pop()
            if id(module) in seen:
                continue
            for parameter in module._parameters.values():
                seen[id(parameter)] = parameter
            found += _keep_module(self, module, 0)
            tree += [child for child in module._modules.values() if child is not None]
        return found

    def enter(self, value: Any, kept: Kept | None = None) -> None:
        """Remember ``value`` as visited, and what puts it back."""
        self._seen[id(value)] = value
        if kept is not None:
            self._kept.append(kept)


_Keeper = Callable[[Memory, Any, int], Iterable[tuple[Any, int]]]


@functools.lru_cache(maxsize=4096)
def _keeper(kind: type) -> _Keeper | None:
    """Return what remembers values of this type; None for those that are left as they are."""
    if issubclass(kind, _OPAQUE):
        return None
    if issubclass(kind, torch.Tensor):
        return _keep_tensor
    if issubclass(kind, nn.Module):
        return _keep_module
    if issubclass(kind, (list, dict, set, deque)):
        return _keep_container
    if issubclass(kind, tuple):
        return _keep_nothing_but_items
    if issubclass(kind, np.ndarray):
        return _keep_array
    if issubclass(kind, _GENERATORS):
        return _keep_generator
    return _keep_object


def _keep_tensor(memory: Memory, tensor: torch.Tensor, depth: int) -> Iterable[tuple[Any, int]]:
    try:
        memory.enter(tensor, TensorState(tensor))
        memory.tensors.append(tensor)
    except (RuntimeError, NotImplementedError):  # no storage of its own: it stays the object that it is
        memory.enter(tensor)
    return ()


def _keep_container(memory: Memory, container: Any, depth: int) -> Iterable[tuple[Any, int]]:
    mapping = isinstance(container, dict)
    memory.enter(container, Entries(container) if mapping else Items(container))
    found: list[tuple[Any, int]] = []
    if type(container) not in (list, dict, set, deque, OrderedDict) and hasattr(container, "__dict__"):
        found += _attributes_of(memory, container, depth)
    return found + _inside(container.values() if mapping else container, depth)


def _keep_nothing_but_items(memory: Memory, items: tuple[Any, ...], depth: int) -> Iterable[tuple[Any, int]]:
    memory.enter(items)
    return _inside(items, depth)


def _keep_array(memory: Memory, array: Any, depth: int) -> Iterable[tuple[Any, int]]:
    memory.enter(array, ArrayState(array))
    return ()


_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)

#: The process's own, which `audits.random_state.RandomState` puts back; a model may hold them too.
_GLOBAL = (torch.default_generator, np.random.mtrand._rand, getattr(random, "_inst", None))  # type: ignore[attr-defined]


def _keep_generator(memory: Memory, generator: Any, depth: int) -> Iterable[tuple[Any, int]]:
    if any(generator is known for known in _GLOBAL) or isinstance(generator, random.SystemRandom):
        return ()
    if isinstance(generator, torch.Generator):
        kept = Called(generator.set_state, generator.get_state())
    elif isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        kept = Called(functools.partial(setattr, bits, "state"), bits.state)
    elif isinstance(generator, np.random.RandomState):
        kept = Called(generator.set_state, generator.get_state())
    else:
        kept = Called(generator.setstate, generator.getstate())
    memory.enter(generator, kept)
    return ()


def _keep_object(memory: Memory, thing: Any, depth: int) -> Iterable[tuple[Any, int]]:
    return _attributes_of(memory, thing, depth + 1) if depth < OBJECT_DEPTH else ()


def _keep_module(memory: Memory, module: nn.Module, depth: int) -> list[tuple[Any, int]]:
    own, slots, hooks = module.__dict__, slots_of(module), memory.with_hooks
    attributes = Attributes(own, NO_NAMES if hooks else _HOOKS, slots)
    found: list[tuple[Any, int]] = []
    if isinstance(module, torch.jit.ScriptModule):  # its registries are views of what lives in C++
        registries: tuple[Any, ...] = ()
        if "_c" in own:
            script = ScriptAttributes(module)
            memory.enter(module, script)
            found += _inside(script.values, depth)
    else:
        registries = (module._parameters, module._buffers, module._modules)
        for entries in registries:
            if entries:
                found += [(value, depth) for value in entries.values() if value is not None]
    memory.enter(module, ModuleEntries(module, own, attributes, registries))
    for name, value in own.items():
        if type(value) in _ATOMS or name in _REGISTRIES:
            continue
        if name not in _HOOKS:
            found.append((value, depth))
        elif hooks and isinstance(value, dict):
            memory.enter(value, Entries(value))
    if not type(module).__module__.startswith("torch."):
        found += [(value, depth) for value in _shared(memory, type(module))]
    if slots:
        found += _inside([value for _, _, value in slots if value is not MISSING], depth)
    return found


def _shared(memory: Memory, kind: type) -> list[Any]:
    """Return the containers and tensors that all instances share: caches in the class."""
    if id(kind) in memory._seen:
        return []
    memory.enter(kind)
    own = [base for base in kind.__mro__ if not base.__module__.startswith(("torch.", "builtins"))]
    return [
        value
        for base in own
        for name, value in vars(base).items()
        if not name.startswith("__") and isinstance(value, (dict, list, set, deque, torch.Tensor))
    ]


def _attributes_of(memory: Memory, thing: Any, depth: int) -> list[tuple[Any, int]]:
    """Remember an object's own attributes, if it has any that can be set."""
    try:
        own = object.__getattribute__(thing, "__dict__")  # never a proxy's own `__getattr__`
    except AttributeError:
        own = None
    slots = slots_of(thing)
    if type(own) is not dict and not slots:
        return []
    own = own if type(own) is dict else {}
    memory.enter(thing, Attributes(own, frozenset(), slots))
    return _inside([*own.values(), *(value for _, _, value in slots if value is not MISSING)], depth)


def _inside(values: Any, depth: int) -> list[tuple[Any, int]]:
    if len(values) > LARGE:
        return []
    return [(value, depth) for value in values if type(value) not in _ATOMS]


_ATOMS = frozenset({bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size})

#: The entries of a module that hold what is registered in it, and its hooks. What it is compiled to goes with them:
#: whoever evaluates the compiled code sets it for that while.
_REGISTRIES = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"})
_HOOKS = frozenset(vars(nn.Module())) - _REGISTRIES - {"training"} | {"_compiled_call_impl"}
