"""Directions through many tensors, made where they are needed, piece by piece: none is stored that is model-sized.

A random direction is ``v = s_t k 2^-14`` with odd integers ``k`` of either sign, ``2^13 < |k| < 3 * 2^13``: signs at
random and sizes uniform in [1/2, 3/2], of 8,192 levels in the middles of their intervals. Against truly uniform sizes
each ``k 2^-14`` is off by 2^-13 / sqrt(12) in the root mean square, so a sum over an error e by ``3.5e-5 s ||e||``:
0.16 % of the bound B of an error at the detection limit of two probes, ``s ||e|| = 45 B``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from audits.lanes.arithmetic import piece_size, pieces

#: The size of an integer's unit.
LEVEL = 2.0**-14

#: Elements, over all tensors, whose float64 values are held rather than made again: the smallest tensors, up to 16 MiB
#: of each kind. A model that small is held whole.
HELD_ELEMENTS = 2**21


def held_names(sizes: Mapping[str, int]) -> frozenset[str]:
    """Return the names of the smallest tensors, of `HELD_ELEMENTS` together at most."""
    held, total = set(), 0
    for name in sorted(sizes, key=lambda name: sizes[name]):
        total += sizes[name]
        if total > HELD_ELEMENTS:
            break
        held.add(name)
    return frozenset(held)


class Codes:
    """The integers of the random direction that was last moved along, two bytes each.

    Kept while evaluations go along one direction, on a CPU, where making them takes three times as long as the rest of
    a move: two bytes a parameter at a time when there is no gradient.

    Args:
        names: the tensors whose integers are kept.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._unit: Unit | None = None
        self._kept: dict[str, torch.Tensor] = {}
        self._names = frozenset(names)

    def of(self, unit: Unit, name: str) -> torch.Tensor | None:
        """Return a tensor's integers in a direction, flattened, if they are kept."""
        return self._kept.get(name) if unit == self._unit else None

    def keep(self, unit: Unit, name: str, make: Callable[[torch.Tensor, slice], None], like: torch.Tensor) -> None:
        """Make and keep a tensor's integers, if they are to be; those of another direction go."""
        if unit != self._unit:
            self.clear()
            self._unit = unit
        if name in self._names and name not in self._kept:
            codes = torch.empty(like.numel(), dtype=torch.int16)
            for place in pieces(codes):
                make(codes[place], place)
            self._kept[name] = codes

    def clear(self) -> None:
        """Let go of them: memory is needed for gradients."""
        self._unit = None
        self._kept.clear()


class Direction(Protocol):
    """A direction: ``v_t = factor(t) * whole(t)`` for each tensor t of `names`."""

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that move."""

    def factor(self, name: str) -> float:
        """Return what the values of a tensor are to be multiplied by."""

    def piece(self, name: str, place: slice) -> torch.Tensor:
        """Return the values of one of the `pieces` of the flattened tensor."""

    def whole(self, name: str) -> torch.Tensor:
        """Return all values of a tensor, in its shape."""

    def moves(self, name: str) -> None:
        """Say that several evaluations along it may follow, with this tensor moved."""

    def unit_of(self) -> Unit | None:
        """Return what identifies the values of a random direction, None for a given one."""


@dataclass(frozen=True)
class Unit:
    """Which random direction: equal ones have equal values in every tensor, whatever their factors."""

    seed: int
    draw: int


class Random:
    """A random direction through some tensors of a problem.

    Args:
        unit: which one.
        tensors: the problem's tensors, all of them: a tensor's values depend on its place among them.
        scales: s_t by name; the direction is zero in all others.
        held: names whose values are kept once they are made.
        codes: keeps the integers of others on the way.
    """

    def __init__(
        self, unit: Unit, tensors: Mapping[str, torch.Tensor], scales: Mapping[str, float],
        held: frozenset[str] = frozenset(), codes: Codes | None = None,
    ) -> None:  # fmt: skip
        self.unit = unit
        self._codes = codes
        self._tensors, self._scales, self._held = tensors, dict(scales), held
        self._places = {name: position for position, name in enumerate(tensors)}
        self._kept: dict[str, torch.Tensor] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that move."""
        return tuple(self._scales)

    def factor(self, name: str) -> float:
        """Return ``s_t 2^-14``."""
        return self._scales[name] * LEVEL

    def unit_of(self) -> Unit:
        """Return which random direction it is."""
        return self.unit

    def piece(self, name: str, place: slice) -> torch.Tensor:
        """Return the integers of a piece, in the tensor's dtype."""
        if name in self._held:
            return self.whole(name).view(-1)[place]
        like = self._tensors[name]
        values = torch.empty(place.stop - place.start, dtype=like.dtype, device=like.device)
        codes = None if self._codes is None else self._codes.of(self.unit, name)
        if codes is not None:
            return values.copy_(codes[place])
        self._fill(values, name, place)
        return values

    def moves(self, name: str) -> None:
        """Keep the integers of a large tensor on a CPU."""
        like = self._tensors[name]
        if self._codes is not None and name not in self._held and like.device.type == "cpu":
            self._codes.keep(self.unit, name, lambda target, place: self._fill(target, name, place), like)

    def whole(self, name: str) -> torch.Tensor:
        """Return all integers of a tensor, in its shape and dtype."""
        if name in self._kept:
            return self._kept[name]
        like = self._tensors[name]
        values = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        flat = values.view(-1)
        for place in pieces(flat):
            self._fill(flat[place], name, place)
        if name in self._held:
            self._kept[name] = values
        return values

    def _fill(self, target: torch.Tensor, name: str, place: slice) -> None:
        number = place.start // piece_size(target.device)
        fill_with_signs_and_sizes(target, hash((self.unit.seed, self.unit.draw, self._places[name], number)) % 2**63)


class Given:
    """A direction whose values somebody has made."""

    def __init__(self, values: Mapping[str, torch.Tensor]) -> None:
        self._values = values

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that move."""
        return tuple(self._values)

    def factor(self, name: str) -> float:
        """Return 1."""
        return 1.0

    def moves(self, name: str) -> None:
        """Do nothing: the values are there."""

    def unit_of(self) -> None:
        """Return None: such a direction is not made again."""

    def piece(self, name: str, place: slice) -> torch.Tensor:
        """Return the values of a piece."""
        return self._values[name].reshape(-1)[place]

    def whole(self, name: str) -> torch.Tensor:
        """Return the tensor."""
        return self._values[name]


#: No direction at all: theta itself.
NOWHERE = Given({})


def part_of(direction: Direction, name: str, window: slice, like: torch.Tensor) -> torch.Tensor:
    """Return the values of a part of one of the `pieces` of a flattened tensor; the rest of the piece is let go."""
    size = piece_size(like.device)
    start = window.start // size * size
    piece = slice(start, min(start + size, like.numel()))
    if piece == window:
        return direction.piece(name, piece)
    return direction.piece(name, piece)[window.start - start : window.stop - start].clone()


def values_of(direction: Direction, name: str) -> torch.Tensor:
    """Return ``v_t`` itself."""
    return direction.whole(name) * direction.factor(name)


def fill_with_signs_and_sizes(target: torch.Tensor, seed: int) -> None:
    """Write odd integers of random sign between 2^13 and 3 * 2^13 into a flat tensor; equal seeds give equal ones.

    One 64-bit draw makes four elements: half of them a call to `Tensor.uniform_` would cost.
    """
    count = target.numel()
    bits = torch.empty((count + 3) // 4, dtype=torch.int64, device=target.device)
    generator = torch.Generator(device=target.device)
    generator.manual_seed(seed)
    bits.random_(-(2**63), None, generator=generator)  # type: ignore[call-overload] # all 64 bits
    values = bits.view(torch.int16)[:count]
    values.bitwise_right_shift_(1).bitwise_or_(1)  # odd, from -16,383 to 16,383
    signs = values.bitwise_right_shift(15).bitwise_or_(1)
    target.copy_(values.add_(signs, alpha=2**13))
