"""A problem's tensors put to ``theta + t v`` in place, by pieces that fit in the cache."""

from __future__ import annotations

import torch

from audits.lanes.arithmetic import pieces
from audits.lanes.directions import Direction
from audits.lanes.problem import Problem, as_real
from audits.lanes.theta import Theta


class Placing:
    """Writes the tensors; those that did not move are left alone.

    Args:
        problem: whose tensors.
        theta: their values at the point.

    Attributes:
        moved: names of the tensors that are not at theta, or may not be.
    """

    def __init__(self, problem: Problem, theta: Theta) -> None:
        self._problem, self._theta = problem, theta
        self.moved: set[str] = set()

    def at(self, direction: Direction, step: float) -> None:
        """Put the tensors to ``theta + step * direction``."""
        names = set(direction.names)
        for name in self.moved - names:
            self._write(name, None, 0.0)
        for name in direction.names:
            self._write(name, direction, step)
        self.moved = names

    def all_moved(self) -> None:
        """Say that something else may have written any of the tensors."""
        self.moved = set(self._theta.names)

    def _write(self, name: str, direction: Direction | None, step: float) -> None:
        target = as_real(self._problem.tensors[name].data)
        factor = 0.0 if direction is None else step * direction.factor(name)
        stored = self._theta.stored(name)
        if stored is None and target.is_contiguous():
            flat = target.view(-1)
            if direction is not None:
                direction.moves(name)
            for place in pieces(flat):
                piece = flat[place].copy_(self._theta.piece(name, place))
                if direction is not None:
                    piece.add_(direction.piece(name, place), alpha=factor)
        elif direction is None:
            target.copy_(self._theta.whole(name))
        else:
            torch.add(self._theta.whole(name), direction.whole(name), alpha=factor, out=target)
