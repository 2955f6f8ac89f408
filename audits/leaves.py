"""Leaves of a loss's graph that are no parameters of the model, and where they are kept.

Autograd's own record says which tensors a loss is a function of: the ``AccumulateGrad`` nodes of its graph. What is
among them and is no parameter was there before the loss ran (layers in a plain list, a tensor attribute, a buffer, a
network that the loss function holds) or was made by it (a gradient penalty's points): only the former is the same
tensor in two evaluations.
"""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

#: Objects inside objects that are looked into: deeper than people nest layers, a bound where objects refer in circles.
DEPTH = 8

#: Entries beyond which a container is data, and no place where layers are kept.
LARGE = 10_000

#: How a path begins whose tensor the loss function holds.
LOSS = "loss"

#: What is never looked into: plain values, classes, modules of Python, and optimizers, which hold every parameter.
_CLOSED = (
    bool, int, float, complex, str, bytes, type(None), type, types.ModuleType, types.BuiltinFunctionType,
    torch.dtype, torch.device, torch.Size, torch.Generator, torch.optim.Optimizer,
)  # fmt: skip

_REGISTRIES = frozenset({"_parameters", "_buffers", "_modules"})


@dataclass(frozen=True)
class Place:
    """Where a tensor is kept that is registered nowhere.

    Attributes:
        path: of attributes and keys, from the model or from ``loss``.
        how: what keeps it, for a sentence: ``"in a plain list"``.
        cure: what to write instead.
        training: the mode of the module it belongs to there; None where there is none.
    """

    path: str
    how: str
    cure: str
    training: bool | None = None


#: How a learnable tensor is kept that is a buffer.
BUFFER = "as a buffer"

_HOW = {
    "list": ("in a plain list", "nn.ModuleList or nn.ParameterList"),
    "dict": ("in a plain dict", "nn.ModuleDict or nn.ParameterDict"),
    "tensor": ("as a plain tensor attribute", "nn.Parameter"),
    "buffer": (BUFFER, "nn.Parameter"),
    "module": ("past the module's registration", "an ordinary attribute (self.layer = layer)"),
    "object": ("inside of an object that is no module", "an nn.Module"),
}


def leaves_of(loss: torch.Tensor) -> list[torch.Tensor]:
    """Return the leaves that a loss's graph ends in, each once, about in the order in which the forward met them."""
    found: dict[int, torch.Tensor] = {}
    seen: set[Any] = set()
    pending: list[Any] = [loss.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, torch.Tensor) and not node.next_functions:
            found[id(leaf)] = leaf
        pending += [following for following, _ in node.next_functions]
    return list(reversed(found.values()))


class StrayState:
    """Storage and gradients of leaves that are not the model's, put back after whatever the audit did with them."""

    def __init__(self, leaves: Iterable[torch.Tensor]) -> None:
        self.leaves = list(leaves)
        self._saved = [(leaf, leaf.data, leaf.grad) for leaf in self.leaves]

    def restore(self) -> None:
        """Put storage and gradients back."""
        for leaf, data, gradient in self._saved:
            if leaf.data.dtype != data.dtype or leaf.data_ptr() != data.data_ptr():
                leaf.grad = None
                leaf.data = data
            leaf.grad = gradient


def kept_in_model(model: nn.Module) -> dict[int, Place]:
    """Return where the model keeps leaves that require a gradient and are none of its parameters, by tensor's id."""
    registered = {id(parameter) for parameter in model.parameters()}
    seen: dict[int, Any] = {id(module): module for module in model.modules()}
    found: dict[int, Place] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_leaf and buffer.requires_grad:
                found.setdefault(id(buffer), Place(f"{prefix}{name}", *_HOW["buffer"]))
        for name, value in _own(module):
            for way, tensor, training in _walk(value, f"{prefix}{name}", 0, seen):
                if id(tensor) not in registered:
                    found.setdefault(id(tensor), Place(way, *_HOW[_kind(value)], training))
    return found


def kept_in_loss(loss: Any, model: nn.Module) -> dict[int, Place]:
    """Return where a loss function keeps leaves that require a gradient, by tensor's id: what it closes over, names."""
    seen: dict[int, Any] = {id(module): module for module in model.modules()}
    registered = {id(parameter) for parameter in model.parameters()}
    found: dict[int, Place] = {}
    for path, tensor, training in _walk(loss, LOSS, 0, seen):
        if id(tensor) not in registered:
            found.setdefault(id(tensor), Place(path, "by the loss function", "", training))
    return found


def _own(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield a module's plain attributes; its registries and hooks are not among them."""
    base = vars(nn.Module())
    for name, value in vars(module).items():
        if name not in _REGISTRIES and name not in base:
            yield name, value


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "tensor"
    if isinstance(value, Mapping):
        return "dict"
    if isinstance(value, (list, tuple, set, deque)):
        return "list"
    return "module" if isinstance(value, nn.Module) else "object"


def _walk(
    value: Any, path: str, depth: int, seen: dict[int, Any], training: bool | None = None
) -> Iterator[tuple[str, torch.Tensor, bool | None]]:
    """Yield (path, leaf that requires a gradient, mode of its module) inside of a value."""
    if isinstance(value, torch.Tensor):
        if value.is_leaf and value.requires_grad:
            yield path, value, training
        return
    if isinstance(value, _CLOSED) or depth > DEPTH or id(value) in seen:
        return
    seen[id(value)] = value
    mode = value.training if isinstance(value, nn.Module) else training
    for name, item in _items(value):
        yield from _walk(item, f"{path}.{name}" if name else path, depth + 1, seen, mode)


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, nn.Module):
        for registry in (value._parameters, value._buffers, value._modules):
            yield from registry.items()
        yield from _own(value)
    elif isinstance(value, Mapping):
        yield from ((str(key), item) for key, item in value.items()) if len(value) <= LARGE else ()
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        yield from ((str(i), item) for i, item in enumerate(value)) if len(value) <= LARGE else ()
    elif isinstance(value, functools.partial):
        yield "", value.func
        yield from ((str(i), item) for i, item in enumerate(value.args))
        yield from value.keywords.items()
    elif isinstance(value, types.MethodType):
        yield "", value.__self__
        yield "", value.__func__
    elif isinstance(value, types.FunctionType):
        yield from _held_by_function(value)
    else:
        yield from _attributes(value)


def _held_by_function(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield what a function closes over, its defaults, and the globals that it names."""
    if function.__module__ == "torch" or (function.__module__ or "").startswith("torch."):
        return
    code = function.__code__
    ours = (function.__module__ or "").startswith("audits.")  # the wrapper that calls a loss module
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield "" if ours else name, cell.cell_contents
        except ValueError:  # not filled yet
            continue
    defaults = function.__defaults__ or ()
    yield from zip(code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount], defaults, strict=True)
    yield from (function.__kwdefaults__ or {}).items()
    for name in code.co_names:
        held = function.__globals__.get(name)
        yield "" if isinstance(held, types.FunctionType) else name, held


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    try:
        own = object.__getattribute__(value, "__dict__")  # never a proxy's own `__getattr__`
    except AttributeError:
        own = {}
    if type(own) is dict:
        yield from own.items()
    for base in type(value).__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            held = vars(base).get(name)
            if isinstance(held, types.MemberDescriptorType):
                try:
                    yield name, held.__get__(value)
                except AttributeError:  # never set
                    continue
