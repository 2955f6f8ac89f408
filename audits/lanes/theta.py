"""Where tensors' values at a point come from: held, cast up from the native ones, or displaced by noise made anew."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from audits.lanes.arithmetic import norm, piece_size, pieces
from audits.lanes.directions import Codes, Random, Unit, held_names
from audits.lanes.problem import Problem, as_real


class Theta:
    """The values of a problem's tensors at its start, as dense real tensors.

    Small tensors are held in the lane's dtype, and so are those without a native counterpart; of the others every piece
    is cast up when it is needed, which gives the same values.

    Args:
        problem: its tensors are at the values that are meant.

    Attributes:
        held: names whose values, directions and gradients may be held.
        codes: the integers of the direction along which evaluations go.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        reals = {name: as_real(tensor.detach()) for name, tensor in problem.tensors.items()}
        self.held = held_names({name: t.numel() for name, t in reals.items()})
        self._native = {
            name: as_real(native)
            for name, native in problem.native.items()
            if name not in self.held and reals[name].is_contiguous() and as_real(native).is_contiguous()
        }
        self._stored = {
            name: t.clone(memory_format=torch.contiguous_format)
            for name, t in reals.items()
            if name not in self._native
        }
        self.likes: Mapping[str, torch.Tensor] = reals
        self.codes = Codes([name for name in reals if name not in self.held])

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors' names."""
        return tuple(self.likes)

    def stored(self, name: str) -> torch.Tensor | None:
        """Return a tensor's values if they are held; not to be written."""
        return self._stored.get(name)

    def piece(self, name: str, place: slice) -> torch.Tensor:
        """Return one of the `pieces` of the flattened tensor, in the lane's dtype or the native one."""
        stored = self._stored.get(name)
        source = self._native[name] if stored is None else stored
        return source.view(-1)[place]

    def whole(self, name: str) -> torch.Tensor:
        """Return a tensor's values, in its shape and the lane's dtype; not to be written."""
        stored = self._stored.get(name)
        if stored is not None:
            return stored
        made = torch.empty_like(self.likes[name], memory_format=torch.contiguous_format)
        flat = made.view(-1)
        for place in pieces(flat):
            flat[place].copy_(self.piece(name, place))
        return made

    def random(self, unit: Unit, scales: Mapping[str, float]) -> Random:
        """Return a random direction through some tensors, ``scales`` by name."""
        return Random(unit, self.likes, scales, self.held, self.codes)

    def equals(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether a tensor has the values of the point."""
        stored = self._stored.get(name)
        if stored is not None or not tensor.is_contiguous():
            return torch.equal(tensor, self.whole(name))
        flat = tensor.view(-1)
        return all(torch.equal(flat[place], self.piece(name, place).to(flat.dtype)) for place in pieces(flat))

    def replace(self, name: str, values: torch.Tensor) -> None:
        """Let a tensor have other values at this point."""
        self._stored[name] = values

    @functools.cached_property
    def norms(self) -> dict[str, float]:
        """Euclidean norm of each tensor."""
        return {name: self._norm(name) for name in self.names}

    def _norm(self, name: str) -> float:
        stored = self._stored.get(name)
        if stored is not None:
            return norm(stored)
        like = self.likes[name]
        squares = [torch.linalg.vector_norm(self.piece(name, place), dtype=torch.float64) for place in pieces(like)]
        return float(torch.linalg.vector_norm(torch.stack(squares))) if squares else 0.0


class Displaced(Theta):
    """Another point: ``theta + size_t * N(0, 1)`` for some tensors, the noise the same whenever a piece is made.

    Args:
        origin: the point to start from.
        sizes: size_t by name; other tensors stay.
        seed: of the noise.
    """

    def __init__(self, origin: Theta, sizes: Mapping[str, float], seed: int) -> None:
        self._origin, self._sizes, self._seed = origin, dict(sizes), seed
        self.held, self.likes, self.codes = origin.held, origin.likes, origin.codes
        self._positions = {name: position for position, name in enumerate(origin.names)}
        self._stored = {}
        for name in origin.names:
            stored = origin.stored(name)
            if stored is not None:
                self._stored[name] = stored if name not in self._sizes else self._moved(name, stored)

    def piece(self, name: str, place: slice) -> torch.Tensor:
        """Return one of the `pieces` of the flattened tensor."""
        stored = self._stored.get(name)
        if stored is not None:
            return super().piece(name, place)
        here = self._origin.piece(name, place)
        return here if name not in self._sizes else self._noise(name, place).add_(here)

    def _moved(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        moved = torch.empty(stored.shape, dtype=stored.dtype, device=stored.device)
        flat, before = moved.view(-1), stored.reshape(-1)
        for place in pieces(flat):
            flat[place] = self._noise(name, place).add_(before[place])
        return moved

    def _noise(self, name: str, place: slice) -> torch.Tensor:
        like = self.likes[name]
        number = place.start // piece_size(like.device)
        generator = torch.Generator(device=like.device)
        generator.manual_seed(hash((self._seed, self._positions[name], number)) % 2**63)
        options: dict[str, Any] = {"generator": generator, "device": like.device, "dtype": torch.float32}
        noise = torch.randn(place.stop - place.start, **options)  # float32 is five times as fast, and any point will do
        return noise.to(like.dtype).mul_(self._sizes[name])


class Itself:
    """The direction from zero to theta: ``theta (1 + t)`` along it.

    Args:
        theta: the values.
    """

    def __init__(self, theta: Theta) -> None:
        self._theta = theta

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors."""
        return self._theta.names

    def factor(self, name: str) -> float:
        """Return 1."""
        return 1.0

    def moves(self, name: str) -> None:
        """Do nothing: the values are there."""

    def unit_of(self) -> None:
        """Return None: it is no random direction."""

    def piece(self, name: str, place: slice) -> torch.Tensor:
        """Return the values of a piece."""
        return self._theta.piece(name, place)

    def whole(self, name: str) -> torch.Tensor:
        """Return the tensor's values."""
        return self._theta.whole(name)
