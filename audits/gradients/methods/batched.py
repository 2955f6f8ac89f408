"""Many one-element displacements in one forward: `torch.func.vmap` over copies of one tensor, where it is the same."""

from __future__ import annotations

import numpy as np
import torch

from audits.gradients.methods.swapping import slots_of, swapped
from audits.lanes.evaluation import Point
from audits.lanes.problem import quiet
from audits.lanes.program import BranchMismatchError, Program, Recording, Replaying

#: Displacements per forward, or as many as a tensor has elements: beyond 128 the time per element hardly changes.
CHUNK = 128

#: Elements of each tensor that are evaluated both ways before vmap is trusted with the rest, at least in part.
VALIDATED = 8

#: The two ways may differ by this many roundoffs of |f|: sums over a batch of copies run in another order.
AGREEMENT = 64.0


class BatchedElements:
    """``f(theta + step e_i)`` for many elements i of one tensor at once.

    Attributes:
        base: f(theta), by the same arithmetic.

    Raises:
        RuntimeError: vmap refuses the model (old-style Functions, BatchNorm in train mode, LSTM, ``.item()``), draws
            other noise (a fused dropout), or gives other values than the plain loop.
    """

    def __init__(self, point: Point, name: str) -> None:
        model = point.problem.model
        theta = point.theta(name)
        tensor = point.problem.tensors[name]
        if model is None or tensor.is_complex() or tensor.layout is not torch.strided:
            raise RuntimeError("vmap takes real dense parameters only")
        self._point, self._name = point, name
        self._slots = slots_of(model, {name: tensor})
        self._theta = theta
        self._flat = theta.reshape(-1)
        point.settle()
        self._program: Program | None = None
        self._size = min(CHUNK, theta.numel())
        self._copies = theta.expand(self._size, *theta.shape).clone()
        base = self._run()
        if not np.allclose(base, point.value, rtol=AGREEMENT * point.problem.roundoff, atol=0.0):
            raise RuntimeError("vmap gives another loss at theta")
        self.base = float(base[0])
        self._validate()

    def values(self, indices: list[int], steps: np.ndarray) -> np.ndarray:
        """Return the losses, one per element and its step."""
        parts = [slice(start, start + self._size) for start in range(0, len(indices), self._size)]
        return np.concatenate([self._values(indices[part], steps[part]) for part in parts])

    def _values(self, indices: list[int], steps: np.ndarray) -> np.ndarray:
        copies = self._copies.view(self._size, -1)
        rows = torch.arange(len(indices), device=copies.device)
        columns = torch.as_tensor(indices, device=copies.device)
        copies[rows, columns] += torch.as_tensor(steps, dtype=copies.dtype, device=copies.device)
        try:
            return self._run()[: len(indices)]
        finally:
            copies[rows, columns] = self._flat[columns]

    def moved(self, indices: list[int], step: float) -> np.ndarray:
        """Return by how much each element moves: ``step`` as far as theta's precision holds it."""
        return moved(self._theta, indices, step)

    def _run(self) -> np.ndarray:
        problem = self._point.problem
        problem.before()

        def one(copy: torch.Tensor) -> torch.Tensor:
            with swapped(self._slots, {self._name: copy}):
                return problem.loss()

        with quiet(), torch.no_grad():
            if self._program is None:
                program = Program()
                with Recording(program, problem.tape.cursor(strict=True), lift=problem.lifts):
                    out = torch.func.vmap(one, randomness="same")(self._copies)
                self._program = program
            elif self._program.idle:
                out = torch.func.vmap(one, randomness="same")(self._copies)
            else:
                mode = Replaying(self._program, problem.tape.cursor(strict=True))
                with mode:
                    out = torch.func.vmap(one, randomness="same")(self._copies)
                mode.finish()
        self._point.evaluations += self._size
        return np.asarray(out.detach().double().cpu().numpy())

    def _validate(self) -> None:
        count = self._theta.numel()
        chosen = sorted({round(i * (count - 1) / max(VALIDATED - 1, 1)) for i in range(min(VALIDATED, count))})
        rms = max(float(torch.linalg.vector_norm(self._theta)) / count**0.5, 1e-2)
        batched = self.values(chosen, np.full(len(chosen), rms / 100))
        plain = [self._point.along_element(self._name, i, rms / 100) for i in chosen]
        self._point.settle()
        tolerance = AGREEMENT * self._point.problem.roundoff * max(abs(v) for v in plain)
        if not np.allclose(batched, plain, rtol=0.0, atol=tolerance):
            raise RuntimeError("vmap gives other values than the plain loop")


class PlainElements:
    """`BatchedElements` by one forward an element: for models that vmap does not take, and for tiny tensors."""

    def __init__(self, point: Point, name: str) -> None:
        self._point, self._name = point, name
        self.base = point.value

    def values(self, indices: list[int], steps: np.ndarray) -> np.ndarray:
        """Return the losses, one per element and its step."""
        moves = zip(indices, steps.tolist(), strict=True)
        return np.array([self._point.along_element(self._name, index, step) for index, step in moves])

    def moved(self, indices: list[int], step: float) -> np.ndarray:
        """Return by how much each element moves."""
        return moved(self._point.theta(self._name), indices, step)


def moved(theta: torch.Tensor, indices: list[int], step: float) -> np.ndarray:
    """Return ``(theta_i + step) - theta_i``, which is exact, for some elements."""
    chosen = theta.reshape(-1)[torch.as_tensor(indices, device=theta.device)]
    return np.asarray(((chosen + step) - chosen).double().cpu().numpy())


def batched_elements(point: Point, name: str) -> BatchedElements | None:
    """Return the batched evaluation of one tensor's elements, None where vmap does not hold."""
    try:
        return BatchedElements(point, name)
    except (RuntimeError, ValueError, TypeError, NotImplementedError, BranchMismatchError, AttributeError):
        point.settle()
        return None


def vmap_holds(point: Point, names: list[str]) -> bool:
    """Whether the largest tensor's elements can be evaluated in batches."""
    largest = max(names, key=lambda name: point.theta(name).numel())
    return batched_elements(point, largest) is not None
