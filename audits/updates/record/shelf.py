"""Tensors that wait in host memory: what a model-sized copy of would fill the device."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterator, Mapping, ValuesView
from typing import Any, TypeVar

import torch

from audits.structures import map_tensors

Value = TypeVar("Value")


class Shelf(dict[str, Value]):
    """A dict by parameter whose tensors wait in host memory and are handed out on the device, one at a time.

    On the CPU, which has no other memory, it is a dict: what is handed out is what was put in.

    Args:
        device: where what is handed out is to be.
        entries: what it holds, as it is: already in host memory, or on a shelf of the same device.
    """

    def __init__(self, device: torch.device, entries: Mapping[str, Value] | None = None) -> None:
        super().__init__()
        self.device = device
        for name in entries or {}:
            self.put(name, entries.raw(name) if isinstance(entries, Shelf) else (entries or {})[name])

    def put(self, name: str, value: Value) -> None:
        """Hold what is in host memory already, or is meant to stay where it is."""
        dict.__setitem__(self, name, value)

    def raw(self, name: str) -> Value:
        """Return what is held as it is held."""
        return dict.__getitem__(self, name)

    def same(self, other: Shelf[Value], name: str) -> bool:
        """Whether two shelves hold the very same object under a name."""
        return self.raw(name) is other.raw(name)

    def copy(self) -> Shelf[Value]:
        """Return another shelf with the same objects."""
        return Shelf(self.device, self)

    def __setitem__(self, name: str, value: Value) -> None:
        self.put(name, _mapped(value, waiting))

    def __getitem__(self, name: str) -> Value:
        found: Value = _mapped(self.raw(name), lambda tensor: tensor.to(self.device, non_blocking=True))
        return found

    def get(self, name: str, default: Any = None) -> Any:  # type: ignore[override]
        """Return what is held under a name, on the device."""
        if name not in self:
            return default
        return self[name]

    def __iter__(self) -> Iterator[str]:  # overridden: `dict(shelf)` then asks for each entry by its name
        yield from dict.keys(self)

    def values(self) -> ValuesView[Value]:  # type: ignore[override]
        """Hand out each in turn."""
        return ValuesView(self)

    def items(self) -> ItemsView[str, Value]:  # type: ignore[override]
        """Hand out each in turn."""
        return ItemsView(self)

    def add(self, other: Shelf[Value]) -> None:
        """Hold what another shelf of this device holds, too."""
        for name in other:
            self.put(name, other.raw(name))


def waiting(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor in host memory: pinned for CUDA, so that it comes back fast; on the CPU the tensor itself."""
    if tensor.device.type == "cpu":
        return tensor
    if tensor.device.type != "cuda" or tensor.layout is not torch.strided:
        return tensor.to("cpu")
    try:
        held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    except RuntimeError:  # no more memory can be pinned
        return tensor.to("cpu")
    return held.copy_(tensor)


def snapshot_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of the values that waits in host memory."""
    tensor = tensor.detach()
    return tensor.clone() if tensor.device.type == "cpu" else waiting(tensor)


def held(entries: Mapping[str, Value], name: str) -> Value | None:
    """Return what is held under a name, as it is held: on the device or in host memory; None where nothing is."""
    if name not in entries:
        return None
    return entries.raw(name) if isinstance(entries, Shelf) else entries[name]


def _mapped(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return map_tensors(value, function) if value is not None else None
