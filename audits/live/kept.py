"""States that are put back: entries, items, attributes, a module's registries, tensors, arrays, generators.

Each remembers what it was given and compares by identity alone: ``==`` of tensors is no truth value.
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict, deque
from collections.abc import Callable
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import nn

MISSING = object()
NO_NAMES: frozenset[str] = frozenset()


class Entries:
    """A dict's keys and values, in order."""

    __slots__ = ("_dict", "_saved")

    def __init__(self, entries: Any) -> None:
        self._dict = entries
        self._saved = dict(entries)

    def restore(self) -> None:
        """Put the entries back."""
        if not _same(self._dict, self._saved):
            _put_back(self._dict, self._saved)


class Items:
    """A list's, deque's or set's items."""

    __slots__ = ("_container", "_saved")

    def __init__(self, container: Any) -> None:
        self._container = container
        self._saved = tuple(container)

    def restore(self) -> None:
        """Put the items back."""
        now, saved = self._container, self._saved
        if len(now) == len(saved) and all(map(is_, now, saved)):
            return
        if isinstance(now, set):
            set.clear(now)
            set.update(now, saved)
        else:
            kind: Any = list if isinstance(now, list) else deque
            kind.clear(now)
            kind.extend(now, saved)


class Attributes:
    """The entries of a ``__dict__`` and of ``__slots__``, but some names."""

    __slots__ = ("_left", "_own", "_saved", "_slots")

    def __init__(self, own: dict[str, Any], left: frozenset[str], slots: list[tuple[Any, Any, Any]]) -> None:
        self._own = own
        self._left = left
        self._saved = dict(own)
        self._slots = slots

    def restore(self) -> None:
        """Put the attributes back."""
        own, saved = self._own, self._saved
        if not _same(own, saved):
            # never empty in between: an interrupt here must not leave a module without its own
            for name, value in saved.items():
                if own.get(name, MISSING) is not value and name not in self._left:
                    own[name] = value
            for name in [n for n in own if n not in saved and n not in self._left]:
                del own[name]
        for slot, owner, value in self._slots:
            if _slot_value(slot, owner) is not value:
                slot.__delete__(owner) if value is MISSING else slot.__set__(owner, value)


class ModuleEntries:
    """A module's class, its attributes, and what is registered in it under which name."""

    __slots__ = ("_attributes", "_kind", "_module", "_own", "_registered", "_unsaved")

    def __init__(self, module: nn.Module, own: dict[str, Any], attributes: Attributes, registered: Any) -> None:
        self._module, self._kind, self._own, self._attributes = module, type(module), own, attributes
        self._registered = [(entries, dict(entries) if entries else None) for entries in registered]
        self._unsaved = set(module._non_persistent_buffers_set)

    def restore(self) -> None:
        """Put the class, attributes and registries back."""
        module = self._module
        if type(module) is not self._kind:  # a parametrization
            module.__class__ = self._kind
        if module.__dict__ is not self._own:
            module.__dict__ = self._own
        self._attributes.restore()
        for entries, saved in self._registered:
            if entries if saved is None else not _same(entries, saved):
                _put_back(entries, saved or {})
        if (unsaved := module._non_persistent_buffers_set) != self._unsaved:
            unsaved.clear()
            unsaved.update(self._unsaved)


class TensorState:
    """A tensor's memory, values, and, of a leaf, gradient and ``requires_grad``."""

    __slots__ = ("_grad", "_leaf", "_memory", "_requires_grad", "_tensor", "_value", "_written")

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self._leaf = tensor.is_leaf
        self._grad = tensor.grad if self._leaf else None
        self._requires_grad = tensor.requires_grad
        self._memory = tensor.data
        self._written = _written(self._memory)
        self._value = None if self._written is None else self._written.clone()

    def restore(self) -> None:
        """Put memory and values back."""
        tensor = self._tensor
        if self._leaf and tensor.grad_fn is not None:
            tensor.detach_()  # an in-place operation had made it part of a graph
        if _place(tensor) != _place(self._memory):
            tensor.data = self._memory
        if self._written is not None and self._value is not None:
            self._written.copy_(self._value)
        if self._leaf:
            if tensor.requires_grad is not self._requires_grad:
                tensor.requires_grad_(self._requires_grad)
            if tensor.grad is not self._grad:
                tensor.grad = self._grad


class ArrayState:
    """A NumPy array's values."""

    __slots__ = ("_array", "_value")

    def __init__(self, array: Any) -> None:
        self._array, self._value = array, array.copy()

    def restore(self) -> None:
        """Put the values back."""
        if self._array.shape == self._value.shape and self._array.flags.writeable:
            np.copyto(self._array, self._value)


class Called:
    """A state that one call takes back."""

    __slots__ = ("_put", "_state")

    def __init__(self, put: Callable[[Any], Any], state: Any) -> None:
        self._put, self._state = put, state

    def restore(self) -> None:
        """Put the state back."""
        self._put(self._state)


class ScriptAttributes:
    """Parameters, buffers and attributes of a ScriptModule: they live in C++.

    Attributes:
        values: what they hold.
    """

    __slots__ = ("_held", "_module", "values")

    def __init__(self, module: Any) -> None:
        self._module = module._c
        known = module._concrete_type.get_attributes() if "_concrete_type" in vars(module) else {}
        names = dict.fromkeys([*known, *module._parameters.keys(), *module._buffers.keys(), "training"])
        self._held = {n: module._c.getattr(n) for n in names if module._c.hasattr(n)}
        self.values = list(self._held.values())

    def restore(self) -> None:
        """Put them back."""
        for name, value in self._held.items():
            if self._module.getattr(name) is not value:
                self._module.setattr(name, value)


def _same(now: dict[Any, Any], saved: dict[Any, Any]) -> bool:
    return (
        len(now) == len(saved)
        and all(map(is_, now, saved))
        and all(map(is_, now.values(), saved.values()))
    )  # fmt: skip


def _put_back(now: dict[Any, Any], saved: dict[Any, Any]) -> None:
    """Empty the dict and fill it again, by its base's own methods: a subclass may do more in its own."""
    kind: Any = OrderedDict if isinstance(now, OrderedDict) else dict
    kind.clear(now)
    for key, value in saved.items():
        kind.__setitem__(now, key, value)


def _place(tensor: torch.Tensor) -> Any:
    """Where a tensor's elements lie, and how."""
    if tensor.layout is not torch.strided:
        return None
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _written(memory: torch.Tensor) -> torch.Tensor | None:
    """Return a view of all that can be written, each element once; None where values cannot be put back."""
    if type(memory) is not torch.Tensor or memory.is_meta or memory.is_nested or memory.layout is torch._mkldnn:  # type: ignore[attr-defined]
        return None
    if memory.layout is not torch.strided or memory.is_contiguous():
        return memory
    for dimension, (size, stride) in enumerate(zip(memory.shape, memory.stride(), strict=True)):
        if stride == 0 and size > 1:  # expanded
            memory = memory.narrow(dimension, 0, 1)
    return None if torch._debug_has_internal_overlap(memory) == 1 else memory  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=4096)
def _slots(kind: type) -> tuple[Any, ...]:
    return tuple(
        member
        for base in kind.__mro__
        if "__slots__" in vars(base)
        for member in vars(base).values()
        if isinstance(member, types.MemberDescriptorType)
    )


def slots_of(thing: Any) -> list[tuple[Any, Any, Any]]:
    """Return (descriptor, the thing, value or `MISSING`) of each of its ``__slots__``."""
    slots = _slots(type(thing))  # type: ignore[arg-type]
    return [(slot, thing, _slot_value(slot, thing)) for slot in slots] if slots else []


def _slot_value(slot: Any, thing: Any) -> Any:
    try:
        return slot.__get__(thing)
    except AttributeError:
        return MISSING
