"""A copy of an object graph with some of its objects replaced: what stands for a parameter, and back.

`copy.deepcopy` would copy the model that an optimizer refers to, stop at the first lock, and leave a closure pointing
to the original. Here modules, classes, importable functions and what cannot be copied stay the very objects; closures
are made anew around copies of what they hold; whatever is held twice is one object in the copy too.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import logging
import threading
import types
import weakref
from collections.abc import Callable, Collection, Iterator
from typing import Any, cast

import torch
from torch import nn

from audits.recipe.callables import importable_path

#: What `Replace` answers about an object that is copied as usual.
SAME = object()

#: What it answers about an object that the copy has no place for: left out of containers, None elsewhere.
GONE = object()

#: ``(object) -> what takes its place``, `SAME` or `GONE`.
Replace = Callable[[Any], Any]

_ATOMS = (bool, float, complex, str, bytes, type(None), type, types.ModuleType, types.CodeType, torch.dtype,
          torch.device, torch.layout, torch.Size, nn.Module, logging.Logger, threading.Thread)  # fmt: skip


class Copier:
    """Copies objects, one replacement and one memory of what was copied for the whole copy.

    Args:
        replace: what takes the place of an object.
        tensor: the copy of a tensor that is not replaced.
    """

    def __init__(self, replace: Replace, tensor: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._replace = replace
        self._tensor = tensor
        self._done: dict[int, tuple[Any, Any]] = {}  # the original is kept, so that its id stays its own

    def value(self, given: Any) -> Any:
        """Return the copy, None for what is gone."""
        found = self._copy(given)
        return None if found is GONE else found

    def into(self, target: Any, source: Any, *, without: Collection[str] = ()) -> None:
        """Give ``target`` copies of the attributes of ``source``, those in slots included."""
        self.remember(source, target)
        for name, held in attributes_of(source):
            if name in without:
                continue
            found = self._copy(held)
            with contextlib.suppress(AttributeError, TypeError):  # a read-only attribute
                object.__setattr__(target, name, None if found is GONE else found)

    def remember(self, given: Any, made: Any) -> Any:
        """Have ``made`` stand for ``given`` wherever it is held; returns it."""
        self._done[id(given)] = (given, made)
        return made

    def _copy(self, given: Any) -> Any:
        if id(given) in self._done:
            return self._done[id(given)][1]
        found = self._replace(given)
        if found is not SAME:
            return found
        if isinstance(given, (int, *_ATOMS)):
            return given
        if isinstance(given, torch.Tensor):
            return self.remember(given, self._tensor(given))
        if isinstance(given, (dict, list, tuple, set, frozenset, collections.deque)):
            return self._container(given)
        if isinstance(given, types.FunctionType):
            return self._function(given)
        if isinstance(given, types.MethodType):
            return types.MethodType(self._copy(given.__func__), self._copy(given.__self__))
        if isinstance(given, functools.partial):
            words = {key: self._copy(item) for key, item in given.keywords.items()}
            return self.remember(given, functools.partial(self._copy(given.func), *self._items(given.args), **words))
        if isinstance(given, weakref.ref):
            referent = given()
            known = None if referent is None else self._done.get(id(referent))
            return given if known is None else weakref.ref(known[1])
        if isinstance(given, torch.Generator):
            return self.remember(given, given.clone_state())
        return self._object(given)

    def _items(self, given: Any) -> Iterator[Any]:
        return (item for item in map(self._copy, given) if item is not GONE)

    def _container(self, given: Any) -> Any:
        if isinstance(given, tuple):
            items = tuple(self._items(given))
            if hasattr(given, "_fields"):
                return type(given)(*items) if len(items) == len(given) else GONE
            return self.remember(given, items if type(given) is tuple else type(given)(items))
        if isinstance(given, (set, frozenset)):
            return self.remember(given, type(given)(self._items(given)))
        try:
            made = copy.copy(given)
            made.clear()
        except Exception:  # a class of somebody's own that refuses
            return given
        self.remember(given, made)
        if isinstance(given, dict):
            for key, item in given.items():
                new = (self._copy(key), self._copy(item))
                if GONE not in new:
                    made[new[0]] = new[1]
        else:
            cast("list[Any]", made).extend(self._items(given))
        return made

    def _function(self, given: types.FunctionType) -> Any:
        if not given.__closure__ or importable_path(given) is not None:
            return given
        cells = tuple(types.CellType() for _ in given.__closure__)
        made = types.FunctionType(given.__code__, given.__globals__, given.__name__, given.__defaults__, cells)
        made.__kwdefaults__ = given.__kwdefaults__
        made.__qualname__, made.__module__ = given.__qualname__, given.__module__
        self.remember(given, made)
        for cell, original in zip(cells, given.__closure__, strict=True):
            with contextlib.suppress(ValueError):  # a cell that is still empty
                cell.cell_contents = self.value(original.cell_contents)
        made.__dict__.update({key: self.value(item) for key, item in given.__dict__.items()})
        return made

    def _object(self, given: Any) -> Any:
        """Copy an object of a Python class; one that holds a model is the training script's, and stays."""
        cls = type(given)
        usual = getattr(cls, "__reduce_ex__", None) is getattr(object, "__reduce_ex__", None)
        plain = usual and (hasattr(given, "__dict__") or hasattr(cls, "__slots__"))
        if isinstance(given, torch.optim.Optimizer):
            plain = True
        elif cls.__module__.partition(".")[0] in ("logging", "threading", "builtins", "_thread", "io", "_io"):
            return given
        if not plain or any(isinstance(held, nn.Module) for _, held in attributes_of(given)):
            return given
        try:
            made = object.__new__(cls)
        except TypeError:
            return given
        self.into(made, given)
        return made


def attributes_of(given: Any) -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of an object's own attributes, those in slots included."""
    yield from list(getattr(given, "__dict__", {}).items())
    for cls in type(given).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name in ("__dict__", "__weakref__"):
                continue
            mangled = (
                f"_{cls.__name__.lstrip('_')}{name}" if name.startswith("__") and not name.endswith("__") else name
            )
            with contextlib.suppress(AttributeError):
                yield mangled, getattr(given, mangled)


def alike(one: Any, other: Any) -> bool:
    """Whether two values are the same to the eye: containers and objects by what they hold."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and bool(torch.equal(one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return len(one) == len(other) and all(map(alike, one.values(), other.values()))
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(alike, one, other))
    if hasattr(one, "__dict__") and type(one) is type(other) and not callable(one):
        return alike(vars(one), vars(other))
    try:
        return bool(one == other) or (callable(one) and callable(other))
    except Exception:  # a comparison of somebody's own
        return one is other
