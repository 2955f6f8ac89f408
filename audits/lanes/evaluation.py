"""A loss as a function of named tensors, evaluated around a point on the branch it takes there."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping

import torch

from audits.lanes.arithmetic import norm
from audits.lanes.problem import UNIT_ROUNDOFF, LaneError, Problem, Tensors, as_real, differentiate, quiet
from audits.lanes.program import BranchMismatchError, Free, Program, Recording, Replaying
from audits.outcomes import Lane

#: A replay at theta must give the recorded loss; reordered sums inside frozen operators may differ by this many
#: roundoffs of |f| (64: the native-dtype check's tolerance for a sum done in another order).
REPLAY_TOLERANCE = 64.0


class Point:
    """The problem at one theta: the value, autograd's gradient, and the function around it on theta's branch.

    Attributes:
        value: f(theta).
        gradients: autograd's gradient by name, dense and real; None where autograd gives none.
        program: what the forward did.
        evaluations: how often f was evaluated so far.
        spread: largest |f(theta) - f(theta)| over repeats: 0 unless the loss is nondeterministic.
        value_roundoff: unit roundoff of the loss itself; in the float32 lane its reduction runs in float64.
        rounded: names whose gradient is rounding noise around zero and counts as zero.
    """

    def __init__(self, problem: Problem, *, shift: Tensors | None = None, origin: Point | None = None) -> None:
        self.problem = problem
        self.evaluations = 0
        self._theta: dict[str, torch.Tensor]
        self._original: dict[str, torch.Tensor]
        if origin is not None and shift is not None:
            self._original = origin._theta
            self._theta = {name: t + shift[name] if name in shift else t for name, t in origin._theta.items()}
        else:
            self._theta = {name: as_real(t.detach()).clone() for name, t in problem.tensors.items()}
            self._original = self._theta
        self._moved: set[str] = set(self._theta) if shift is not None else set()
        self._mutates = False
        self.rounded: set[str] = set()
        self.value_roundoff = problem.roundoff
        self.program = Program()
        try:
            self._evaluate()
        except BranchMismatchError:  # the first evaluation filled a cache that is not the model's: now it is full
            self._evaluate()

    def _evaluate(self) -> None:
        self.value = self._record()
        self.gradients, self.analytic_value = self._differentiate()
        self.spread = self._repeat()

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors' names."""
        return tuple(self._theta)

    @property
    def thetas(self) -> Tensors:
        """The tensors' values at the point, by name (real views, not to be changed)."""
        return self._theta

    @functools.cached_property
    def theta_norms(self) -> dict[str, float]:
        """Euclidean norm of each tensor."""
        return {name: norm(value) for name, value in self._theta.items()}

    @functools.cached_property
    def gradient_norms(self) -> dict[str, float]:
        """Euclidean norm of each gradient, 0 where autograd gives none."""
        return {name: norm(self.gradients[name]) for name in self._theta}

    def theta(self, name: str) -> torch.Tensor:
        """Return a tensor's value at the point (real view, not to be changed)."""
        return self._theta[name]

    def along(self, direction: Tensors, step: float) -> float:
        """Return ``f(theta + step * direction)`` on the branch of theta.

        Raises:
            BranchMismatchError: Python took another way through the forward there.
        """
        self._place(direction, step)
        return self._replay()

    def near(
        self, direction: Tensors, windows: Mapping[str, slice], centre: float, spacing: float, count: int
    ) -> list[float]:
        """Return ``f(theta + (centre + i spacing) direction)``, i < count, of which after the first only windows move.

        Args:
            direction: the direction, all of which is moved to ``centre``.
            windows: name -> slice of the flattened tensor that moves on; the others stay at ``centre``.
            centre: distance of the first value.
            spacing: distance between neighbours.
            count: number of values.

        Raises:
            BranchMismatchError: Python took another way through the forward there.
        """
        values = [self.along(direction, centre)]
        views = []
        for name, window in windows.items():
            data, vector = as_real(self.problem.tensors[name].data), direction[name]
            if data.is_contiguous() and vector.is_contiguous():
                views.append((data.view(-1)[window], vector.view(-1)[window]))
            else:
                views.append((data, vector))
        for i in range(1, count):
            if self._mutates:
                self._place(direction, centre + i * spacing)
            else:
                for place, piece in views:
                    place.add_(piece, alpha=spacing)
            values.append(self._replay())
        return values

    def along_element(self, name: str, index: int, step: float) -> float:
        """Return ``f`` with one element of one tensor moved by ``step``."""
        self._place({}, 0.0)
        target = as_real(self.problem.tensors[name].data)
        target.view(-1)[index] += step
        self._moved.add(name)
        return self._replay()

    def settle(self) -> None:
        """Put the tensors to theta."""
        self._place({}, 0.0)

    def restore(self) -> None:
        """Put the tensors back to what they were before the point was made."""
        for name, value in self._original.items():
            as_real(self.problem.tensors[name].data).copy_(value)

    def restore_from_theta(self) -> None:
        """Put the tensors back after another point failed to be made."""
        self._moved = set(self._theta)
        self._place({}, 0.0)

    def nearby_gradients(self, size: float) -> dict[str, torch.Tensor | None]:
        """Return autograd's gradients at ``theta (1 + size)``: what of them is rounding changes entirely."""
        gradients, _ = self._differentiate(self._theta, size)
        return gradients

    def _place(self, direction: Tensors, step: float) -> None:
        for name in self._moved - direction.keys():
            as_real(self.problem.tensors[name].data).copy_(self._theta[name])
        for name, vector in direction.items():
            torch.add(self._theta[name], vector, alpha=step, out=as_real(self.problem.tensors[name].data))
        self._moved = set(direction)

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
        changed = [n for n, t in self.problem.tensors.items() if not torch.equal(as_real(t.data), self._theta[n])]
        if changed:
            # The forward rewrites parameters itself (an embedding's max_norm): autograd's gradient is taken at what it
            # leaves behind, so that is the point.
            if self._original is self._theta:
                self._original = dict(self._theta)
            self._theta |= {n: as_real(self.problem.tensors[n].data).clone() for n in changed}
            self._mutates = True
            self._moved = set(self._theta)
            value = self._record_once()
        return value

    def _record_once(self) -> float:
        self._place({}, 0.0)
        self.problem.before()
        program = Program()
        lift = self.problem.lane is Lane.FLOAT64
        with quiet(), Recording(program, self.problem.tape.cursor(keep_states=True), lift=lift):
            loss = self.problem.loss()
        value = self._number(loss)
        self.program = program
        return value

    def _differentiate(
        self, direction: Tensors | None = None, step: float = 0.0
    ) -> tuple[dict[str, torch.Tensor | None], float]:
        self._place(direction or {}, step)
        self.problem.before()
        tensors = self.problem.tensors
        cursor = self.problem.tape.cursor()
        program = self.program
        needed = program.random or program.lifted
        mode = Free(cursor, lift=self.problem.lane is Lane.FLOAT64) if needed else contextlib.nullcontext()
        with quiet(), mode:
            loss = self.problem.loss()
            cursor.by_state_only = True
            gradients = differentiate(loss, tensors, hooked=self.problem.hooked)
        self._moved = set(self._theta)  # hooks that step the optimizer in the backward have moved everything
        real = {n: None if g is None else as_real(g.detach()) for n, g in gradients.items()}
        return real, float(loss.detach().double())

    def _repeat(self) -> float:
        if self.program.idle:
            again = self.analytic_value  # the backward's own forward is a repeat: no replay has anything to prove
        else:
            self._place({}, 0.0)
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
        self._place({}, 0.0)
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
            self._moved = set(self._theta)
        self.value_roundoff = UNIT_ROUNDOFF[Lane.FLOAT64 if loss.dtype is torch.float64 else Lane.FLOAT32]
        return float(loss.detach())
