"""Nested containers of tensors: dicts, lists, tuples, named tuples, data classes, transformers' ModelOutput."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch


def map_tensors(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return ``value`` with every tensor in it replaced by ``function(tensor)``; everything else stays."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, Mapping):
        items = {key: map_tensors(item, function) for key, item in value.items()}
        return items if type(value) is dict else _rebuild(value, items)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, function) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(item, function) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: map_tensors(getattr(value, f.name), function) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **changed)
    return value


def _rebuild(value: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    try:
        return type(value)(items)  # type: ignore[call-arg]
    except TypeError:
        return items


def any_tensor(value: Any, test: Callable[[torch.Tensor], bool]) -> bool:
    """Whether a tensor among an operator's arguments or results, in lists and tuples, passes the test."""
    if isinstance(value, torch.Tensor):
        return test(value)
    return isinstance(value, (list, tuple)) and any(any_tensor(item, test) for item in value)


def outputs_of(result: Any) -> Sequence[Any]:
    """Return what a function returned as a sequence: several results as they are, a single one alone."""
    return result if isinstance(result, (list, tuple)) else (result,)


def tensors_in(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield ``(path, tensor)`` for every tensor, paths such as ``"inputs.0.mask"``."""
    if isinstance(value, torch.Tensor):
        yield path, value
        return
    if isinstance(value, Mapping):
        items: Any = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    else:
        return
    for key, item in items:
        yield from tensors_in(item, f"{path}.{key}" if path else str(key))
