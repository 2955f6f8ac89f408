"""Norms and products of tensors that may be far larger than the cache: one pass each, in pieces that fit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

#: Elements of a piece: 512 KiB in float64, so that a chain of operations on it stays in a core's cache; on a GPU, where
#: a launch costs more than a pass, 256 times that.
PIECE, PIECE_ON_GPU = 1 << 16, 1 << 24


@dataclass(frozen=True)
class Products:
    """Sums over a direction's elements.

    Attributes:
        total: ``sum g v``.
        absolute: ``sum |g v|``.
        densest: name -> the piece of the flattened tensor with the largest ``sum |g v|``, the first where g is missing.
    """

    total: float
    absolute: float
    densest: Mapping[str, slice]


def pieces(tensor: torch.Tensor) -> Iterator[slice]:
    """Return the slices of a flattened tensor that are worked on at a time."""
    size = PIECE if tensor.device.type == "cpu" else PIECE_ON_GPU
    count = tensor.numel()
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def norm(tensor: torch.Tensor | None) -> float:
    """Return the Euclidean norm, 0 for no tensor."""
    return 0.0 if tensor is None or not tensor.numel() else float(torch.linalg.vector_norm(tensor.double()))


def all_finite(tensor: torch.Tensor, its_norm: float) -> bool:
    """Whether no element is NaN or infinite; a finite norm says so without another pass."""
    return math.isfinite(its_norm) or bool(torch.isfinite(tensor).all())


def dot(first: Mapping[str, torch.Tensor | None], second: Mapping[str, torch.Tensor]) -> Products:
    """Return the sums of ``a b`` and ``|a b|`` over the tensors of the second, in float64."""
    total: list[float] = []
    absolute: list[float] = []
    densest: dict[str, slice] = {}
    for name, vector in second.items():
        gradient = first.get(name)
        if not vector.numel():
            continue
        b = vector.reshape(-1)
        places = list(pieces(b))
        if gradient is None:
            densest[name] = places[0]
            continue
        a = gradient.reshape(-1)
        sums = []
        for place in places:
            product = a[place].to(torch.float64) * b[place].to(torch.float64)
            sums.append(torch.stack([product.sum(), product.abs_().sum()]))
        table = torch.stack(sums)
        signed, sizes = table.sum(0).tolist()
        total.append(signed)
        absolute.append(sizes)
        densest[name] = places[int(table[:, 1].argmax())]
    return Products(math.fsum(total), math.fsum(absolute), densest)


def product_norm(first: Mapping[str, torch.Tensor | None], second: Mapping[str, torch.Tensor]) -> float:
    """Return ``||a b||``, elementwise products over the tensors of the second, in float64."""
    squares = []
    for name, vector in second.items():
        gradient = first.get(name)
        if gradient is None or not vector.numel():
            continue
        a, b = gradient.reshape(-1), vector.reshape(-1)
        squares += [norm(a[place].double() * b[place].double()) ** 2 for place in pieces(b)]
    return math.sqrt(math.fsum(squares))


def random_signs_and_sizes(like: torch.Tensor, scale: float, seed: int, into: torch.Tensor | None) -> torch.Tensor:
    """Return ``scale * sign * U[1/2, 3/2]`` of the shape, dtype and device of ``like``.

    One 64-bit draw makes two elements, 31 bits of size and a sign each: half the price of `Tensor.uniform_`.

    Args:
        like: whose shape, dtype and device to take.
        scale: factor.
        seed: equal seeds give equal values.
        into: a tensor to fill, which saves the pages of a new one.
    """
    vector = torch.empty(like.shape, dtype=like.dtype, device=like.device) if into is None else into
    generator = torch.Generator(device=like.device)
    generator.manual_seed(seed)
    flat = vector.view(-1)
    for place in pieces(flat):
        target = flat[place]
        bits = torch.empty((target.numel() + 1) // 2, dtype=torch.int64, device=like.device)
        bits.random_(-(2**63), None, generator=generator)  # type: ignore[call-overload] # all 64 bits
        # an odd number is no zero: no element's size is below half the scale
        target.copy_(bits.view(torch.int32)[: target.numel()].bitwise_or_(1))
        target.mul_(2.0**-31)
        sizes = target.sign().mul_(0.5)
        target.add_(sizes).mul_(scale)
    return vector
