"""Parameters that lie on one memory without being one Parameter."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Overlap:
    """Two Parameters of a model that share elements in memory.

    Attributes:
        first: name of the one that the model lists first.
        second: name of the other.
        elements: elements of ``first`` that are ``second``'s too.
    """

    first: str
    second: str
    elements: int


@dataclass(frozen=True)
class _Span:
    """Where a parameter lies: bytes from ``start`` up to ``end`` of one storage."""

    name: str
    tensor: torch.Tensor
    storage: tuple[str, int]
    start: int
    end: int


def overlaps_of(model: nn.Module) -> tuple[Overlap, ...]:
    """Return the pairs of distinct Parameters that overlap in memory, by their canonical names.

    Tied parameters are one Parameter and no pair; views that lie side by side in one storage (flattened RNN weights,
    flat buffers, interleaved columns) do not overlap. Tensors without a storage of their own have none to share.
    """
    spans = [span for name, p in model.named_parameters() if (span := _span(name, p)) is not None]
    order = {span.name: position for position, span in enumerate(spans)}
    spans.sort(key=lambda span: (span.storage, span.start))
    found = []
    for _, group in itertools.groupby(spans, key=lambda span: span.storage):
        reaching: list[_Span] = []
        for span in group:
            reaching = [other for other in reaching if other.end > span.start]
            for other in reaching:
                first, second = sorted((other, span), key=lambda s: order[s.name])
                if elements := _shared(first, second):
                    found.append(Overlap(first.name, second.name, elements))
            reaching.append(span)
    return tuple(sorted(found, key=lambda overlap: (order[overlap.first], order[overlap.second])))


def _span(name: str, parameter: torch.Tensor) -> _Span | None:
    try:
        if parameter.layout is not torch.strided or parameter.is_meta or not parameter.numel():
            return None
        tensor = parameter.detach()
        storage = (str(tensor.device), tensor.untyped_storage().data_ptr())
        first = int(tensor.storage_offset())
        last = first + int(sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)))
    except (RuntimeError, NotImplementedError, ValueError):  # lazy, fake, or its elements are kept elsewhere
        return None
    width = tensor.element_size()
    return _Span(name, tensor, storage, first * width, (last + 1) * width) if storage[1] else None


def _shared(first: _Span, second: _Span) -> int:
    """Return how many elements of ``first`` have a byte in common with ``second``."""
    a, b = first.tensor, second.tensor
    if first.start == second.start and a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride():
        return a.numel()
    low, high = min(first.start, second.start), max(first.end, second.end)
    taken = torch.zeros(high - low, dtype=torch.bool)
    _bytes(taken, second, low).fill_(True)
    return int(_bytes(taken, first, low).any(-1).sum())


def _bytes(memory: torch.Tensor, span: _Span, low: int) -> torch.Tensor:
    """Return the view of ``memory`` that a parameter takes, its elements' bytes in a last dimension of their own."""
    tensor, width = span.tensor, span.tensor.element_size()
    sizes, strides = [], []
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        sizes.append(size if stride else 1)  # an expanded dimension is one and the same memory
        strides.append(stride * width)
    return memory.as_strided((*sizes, width), (*strides, 1), span.start - low)
