"""A loss as a function of named tensors, evaluated around a point on the branch it takes there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from audits.lanes.directions import NOWHERE, Direction, Random, Unit, part_of
from audits.lanes.placing import Placing
from audits.lanes.point_gradients import Gradients
from audits.lanes.problem import UNIT_ROUNDOFF, LaneError, Problem, as_real, quiet
from audits.lanes.program import BranchMismatchError, Free, Program, Recording, Replaying
from audits.lanes.theta import Displaced, Theta
from audits.outcomes import Lane

#: A replay at theta must give the recorded loss; reordered sums inside frozen operators may differ by this many
#: roundoffs of |f| (64: the native-dtype check's tolerance for a sum done in another order).
REPLAY_TOLERANCE = 64.0


class Point:
    """The problem at one theta: the value, autograd's gradient, and the function around it on theta's branch.

    Nothing that is as large as the model is held: theta is cast up from the native values, directions are made where
    they are needed, and of a gradient its sums are kept; a large tensor's gradient is computed again where somebody
    needs its elements.

    Args:
        problem: what is evaluated.
        sizes: displace these tensors by so much, normally distributed.
        seed: of that displacement.
        origin: the point to displace.
        units: random directions whose products with the gradient will be asked for.

    Attributes:
        value: f(theta).
        gradients: autograd's gradient at theta.
        program: what the forward did.
        evaluations: how often f was evaluated so far.
        spread: largest |f(theta) - f(theta)| over repeats: 0 unless the loss is nondeterministic.
        value_roundoff: unit roundoff of the loss itself; in the float32 lane its reduction runs in float64.
        rounded: names whose gradient is rounding noise around zero and counts as zero.
    """

    def __init__(
        self, problem: Problem, *, sizes: Mapping[str, float] | None = None, seed: int = 0,
        origin: Point | None = None, units: Sequence[Unit] = (),
    ) -> None:  # fmt: skip
        self.problem = problem
        self.evaluations = 0
        self._origin = origin
        self._theta: Theta = Theta(problem) if origin is None else Displaced(origin._theta, sizes or {}, seed)
        self._place = Placing(problem, self._theta)
        if origin is not None:
            self._place.moved = set(sizes or {}) | origin._place.moved
        self._before: dict[str, torch.Tensor] = {}
        self._mutates = False
        self._units = tuple(units)
        self.gradients = Gradients(problem, self._theta, self._place)
        self.rounded: set[str] = set()
        self.value_roundoff = problem.roundoff
        self.program = Program()
        try:
            self._evaluate()
        except BranchMismatchError:  # the first evaluation filled a cache that is not the model's: now it is full
            self._evaluate()

    def _evaluate(self) -> None:
        self.value = self._record()
        self.gradients.watch(self.program)
        observe = self.problem.observe if self._origin is None else None
        self.analytic_value = self.gradients.evaluate(self._units, observe)
        self.spread = self._repeat()

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors' names."""
        return self._theta.names

    @property
    def theta_norms(self) -> dict[str, float]:
        """Euclidean norm of each tensor."""
        return self._theta.norms

    def theta(self, name: str) -> torch.Tensor:
        """Return a tensor's value at the point (real view, not to be changed)."""
        return self._theta.whole(name)

    def count(self, name: str) -> int:
        """Return how many real elements a tensor has."""
        return self._theta.likes[name].numel()

    def random(self, unit: Unit, scales: Mapping[str, float]) -> Random:
        """Return a random direction through some tensors, ``scales`` by name."""
        return self._theta.random(unit, scales)

    def along(self, direction: Direction, step: float) -> float:
        """Return ``f(theta + step * direction)`` on the branch of theta.

        Raises:
            BranchMismatchError: Python took another way through the forward there.
        """
        self._place.at(direction, step)
        return self._replay()

    def near(self, direction: Direction, centre: float, spacing: float, count: int) -> list[float]:
        """Return ``f(theta + (centre + i spacing) direction)``, i < count, of which after the first only pieces move.

        Args:
            direction: all of it is moved to ``centre``; the `densest` piece of each tensor moves on.
            centre: distance of the first value.
            spacing: distance between neighbours.
            count: number of values.

        Raises:
            BranchMismatchError: Python took another way through the forward there.
        """
        values = [self.along(direction, centre)]
        views = []
        for name in direction.names:
            data, window = as_real(self.problem.tensors[name].data), self.gradients.densest(name)
            if not data.numel():
                continue
            factor = direction.factor(name)
            if data.is_contiguous():
                views.append((data.view(-1)[window], part_of(direction, name, window, data), factor))
            else:
                views.append((data, direction.whole(name), factor))
        for i in range(1, count):
            if self._mutates:
                self._place.at(direction, centre + i * spacing)
            else:
                for place, piece, factor in views:
                    place.add_(piece, alpha=spacing * factor)
            values.append(self._replay())
        return values

    def along_element(self, name: str, index: int, step: float) -> float:
        """Return ``f`` with one element of one tensor moved by ``step``."""
        self.settle()
        target = as_real(self.problem.tensors[name].data)
        target.view(-1)[index] += step
        self._place.moved.add(name)
        return self._replay()

    def settle(self) -> None:
        """Put the tensors to theta."""
        self._place.at(NOWHERE, 0.0)

    def restore(self) -> None:
        """Put the tensors back to what they were before the point was made."""
        if self._origin is not None:
            self._origin.restore_from_theta()
            return
        self.restore_from_theta()
        for name, value in self._before.items():
            as_real(self.problem.tensors[name].data).copy_(value)
            self._place.moved.add(name)

    def restore_from_theta(self) -> None:
        """Put the tensors back to this point after another one was there."""
        self._place.all_moved()
        self.settle()

    def _replay(self) -> float:
        self.problem.before()
        with quiet():
            if self.program.idle:
                return self._number(self.problem.loss())
            mode = Replaying(self.program, self.problem.tape.cursor())
            with mode:
                value = self.problem.loss()
            mode.finish()
            return self._number(value)

    def _record(self) -> float:
        if self.problem.at_point is not None:
            self.problem.at_point()
        value = self._record_once()
        changed = [n for n, t in self.problem.tensors.items() if not self._theta.equals(n, as_real(t.data))]
        if changed:
            # The forward rewrites parameters itself (an embedding's max_norm): autograd's gradient is taken at what it
            # leaves behind, so that is the point.
            for name in changed:
                self._before.setdefault(name, self._theta.whole(name))
                self._theta.replace(name, as_real(self.problem.tensors[name].data).contiguous().clone())
            self._mutates = True
            self._place.all_moved()
            value = self._record_once()
        return value

    def _record_once(self) -> float:
        self.settle()
        self.problem.before()
        program = Program()
        lift = self.problem.lane is Lane.FLOAT64
        with quiet(), Recording(program, self.problem.tape.cursor(recording=True), lift=lift):
            loss = self.problem.loss()
        value = self._number(loss)
        self.program = program
        return value

    def _repeat(self) -> float:
        if self.program.idle:
            again = self.analytic_value  # the backward's own forward is a repeat: no replay has anything to prove
        else:
            self.settle()
            again = self._replay()
        scale = self.problem.roundoff * max(abs(self.value), abs(again))
        difference = abs(again - self.value)
        if not difference > REPLAY_TOLERANCE * scale:
            return 0.0
        values = [self._plain() for _ in range(4)]
        spread = max(values) - min(values)
        if spread == 0.0:
            raise LaneError(
                f"the loss replayed on its own branch is {again!r}, recorded it was {self.value!r}: an operator's "
                "branch rule does not reproduce it"
            )
        return max(spread, difference)

    def _plain(self) -> float:
        self.settle()
        self.problem.before()
        mode = Free(self.problem.tape.cursor(), lift=self.problem.lane is Lane.FLOAT64)
        with quiet(), mode:
            loss = self.problem.loss()
        return self._number(loss)

    def _number(self, loss: torch.Tensor) -> float:
        self.evaluations += 1
        if self.problem.lane is Lane.FLOAT64 and loss.dtype is not torch.float64:
            raise LaneError(f"the loss stays {loss.dtype} in the float64 lane")
        if self._mutates:
            self._place.all_moved()
        self.value_roundoff = UNIT_ROUNDOFF[Lane.FLOAT64 if loss.dtype is torch.float64 else Lane.FLOAT32]
        return float(loss.detach())
