"""Autograd's gradient at a point: its sums are kept, a large tensor's elements are computed again when needed."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

import torch

from audits.lanes.arithmetic import PIECE, norm
from audits.lanes.directions import NOWHERE, Direction, Random, Unit
from audits.lanes.gradient_sums import (
    GivenInPartsError,
    Products,
    Reduction,
    Sums,
    Taker,
    differentiate_into,
    dot,
    read_all,
)
from audits.lanes.placing import Placing
from audits.lanes.problem import Problem, quiet
from audits.lanes.program import Free, Program
from audits.lanes.theta import Itself, Theta


class Gradients:
    """Autograd's gradient of each tensor at theta.

    Args:
        problem: the loss.
        theta: the tensors' values at the point.
        place: puts them there.
    """

    def __init__(self, problem: Problem, theta: Theta, place: Placing) -> None:
        self._problem, self._theta, self._place = problem, theta, place
        self._program = Program()
        self._in_parts: frozenset[str] = frozenset()
        self._held: dict[str, torch.Tensor] = {}
        self._sums: dict[str, Sums] = {}

    def watch(self, program: Program) -> None:
        """Say what the forward does at theta."""
        self._program = program

    def evaluate(self, units: Sequence[Unit], observe: Callable[[str, torch.Tensor], None] | None) -> float:
        """Differentiate at theta and return the loss of that forward.

        Args:
            units: random directions whose products will be asked for.
            observe: called with every gradient when it is ready.
        """
        self._held, self._sums = {}, {}
        wanted = self._directions(units, self._theta.names)

        def take(name: str, gradient: torch.Tensor, unread: dict[str, Reduction]) -> bool:
            unread[name] = Reduction(name, gradient, self._theta.piece, wanted)
            if observe is not None:
                observe(name, gradient)
            return name in self._theta.held

        return self._backward(take)

    @functools.cached_property
    def norms(self) -> dict[str, float]:
        """Euclidean norm of each gradient, 0 where autograd gives none."""
        return {name: self._sums[name].norm if name in self._sums else 0.0 for name in self._theta.names}

    def __contains__(self, name: str) -> bool:
        """Whether autograd gives a tensor a gradient."""
        return name in self._sums

    def __getitem__(self, name: str) -> torch.Tensor | None:
        """Return autograd's gradient, dense and real; None where autograd gives none.

        A large one is computed again by a whole backward: use `holding` to ask more than once.
        """
        if name not in self._sums or name in self._held:
            return self._held.get(name)
        with self.holding([name]):
            return self._held.get(name)

    def all_finite(self, name: str) -> bool:
        """Whether no element is NaN or infinite; a finite norm says so without another pass."""
        gradient = None if math.isfinite(self.norms[name]) else self[name]
        return gradient is None or bool(torch.isfinite(gradient).all())

    @contextlib.contextmanager
    def holding(self, names: Sequence[str]) -> Iterator[None]:
        """Hold the gradients of some tensors meanwhile."""
        missing = {name for name in names if name in self._sums and name not in self._held}
        if missing:
            self._backward(lambda name, gradient, unread: name in missing)
        try:
            yield
        finally:
            for name in missing:
                self._held.pop(name, None)

    def prepare(self, units: Sequence[Unit], names: Sequence[str]) -> None:
        """Compute what `products` will be asked for, for several random directions in one backward."""
        wanted = self._directions(units, names)
        missing = {n for n in names if n in self._sums and any(unit not in self._sums[n].along for unit in units)}
        at_hand = {
            name: Reduction(name, self._held[name], self._theta.piece, wanted) for name in missing & set(self._held)
        }
        self._learn(at_hand)
        missing -= set(at_hand)

        def take(name: str, gradient: torch.Tensor, unread: dict[str, Reduction]) -> bool:
            if name in missing:
                unread[name] = Reduction(name, gradient, self._theta.piece, wanted)
            return False

        if missing:
            self._backward(take)

    def products(self, direction: Direction, without: Collection[str] = ()) -> Products:
        """Return the sums of ``g v`` and ``|g v|`` over the tensors of a direction, in float64.

        Args:
            direction: v.
            without: tensors whose gradient counts as zero.
        """
        names = [name for name in direction.names if name in self._sums and name not in without]
        unit = direction.unit_of()
        if unit is None:
            with self.holding(names):
                found = [dot(self._held[name], direction, name) for name in names]
        else:
            self.prepare([unit], names)
            found = [self._sums[name].along[unit] for name in names]
        factors = [direction.factor(name) for name in names]
        return Products(
            math.fsum(f * total for f, (total, _) in zip(factors, found, strict=True)),
            math.fsum(abs(f) * size for f, (_, size) in zip(factors, found, strict=True)),
        )

    def weighted_norm(self, without: Collection[str] = ()) -> float:
        """Return ``||g theta||``, elementwise products over all tensors."""
        return math.sqrt(math.fsum(s.weighted**2 for name, s in self._sums.items() if name not in without))

    def densest(self, name: str) -> slice:
        """Return where in the flattened tensor the gradient is largest, its beginning where there is none."""
        if name in self._sums:
            return self._sums[name].densest
        return slice(0, min(PIECE, self._theta.likes[name].numel()))

    def changes_nearby(self, names: Sequence[str], size: float) -> dict[str, float]:
        """Return ``||g(theta) - g(theta (1 + size))||`` by tensor: what of a gradient is rounding changes entirely."""
        changes = {name: self.norms[name] for name in names}  # autograd may give none there
        with self.holding(names):

            def compare(name: str, gradient: torch.Tensor, unread: dict[str, Reduction]) -> bool:
                if name in changes and name in self._held:
                    changes[name] = norm(self._held[name] - gradient)
                return False

            self._backward(compare, Itself(self._theta), size)
        return changes

    def _directions(self, units: Sequence[Unit], names: Sequence[str]) -> list[Random]:
        return [self._theta.random(unit, dict.fromkeys(names, 1.0)) for unit in units]

    def _learn(self, unread: dict[str, Reduction]) -> None:
        for name, found in read_all(unread).items():
            known = self._sums.get(name)
            self._sums[name] = found if known is None else replace(found, along=known.along | found.along)

    def _backward(
        self, take: Callable[[str, torch.Tensor, dict[str, Reduction]], bool], direction: Direction = NOWHERE,
        step: float = 0.0,
    ) -> float:  # fmt: skip
        """Hand autograd's gradients at ``theta + step * direction`` over; return the loss there."""
        while True:
            unread: dict[str, Reduction] = {}

            def taken(name: str, gradient: torch.Tensor, unread: dict[str, Reduction] = unread) -> bool:
                return take(name, gradient, unread)

            try:
                held, value = self._backward_once(taken, direction, step)
            except GivenInPartsError as error:
                self._in_parts |= error.names
                continue
            self._held |= held
            self._learn(unread)
            return value

    def _backward_once(self, take: Taker, direction: Direction, step: float) -> tuple[dict[str, torch.Tensor], float]:
        problem, program = self._problem, self._program
        self._theta.codes.clear()
        self._place.at(direction, step)
        problem.before()
        cursor = problem.tape.cursor()
        mode = Free(cursor, lift=problem.lifts) if program.random or program.lifted else contextlib.nullcontext()
        with quiet(), mode:
            loss = problem.loss()
            cursor.by_state_only = True
            held = differentiate_into(loss, problem.tensors, take, hooked=problem.hooked, at_the_end=self._in_parts)
        self._place.all_moved()  # hooks that step an optimizer in the backward have moved everything
        return held, float(loss.detach().double())
