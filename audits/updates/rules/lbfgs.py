"""L-BFGS: the two-loop recursion over all parameters at once, with a fixed step or a strong-Wolfe line search."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

#: ``evaluate(theta) -> (loss, gradient)`` on the flat parameter vector.
Evaluate = Callable[[torch.Tensor], tuple[float, torch.Tensor]]

#: Curvature below which a pair is not kept, as torch has it.
LEAST_CURVATURE = 1e-10

#: Sufficient decrease and curvature of the Wolfe conditions, and most evaluations (minFunc's defaults).
DECREASE, CURVATURE, MOST_TRIALS = 1e-4, 0.9, 25

#: L2 in eps of float64; the healthy worst is 12, since curvature pairs are differences of close gradients.
THRESHOLD = 100.0

#: With the line search: cubic interpolation divides differences of losses that agree to many digits; healthy worst
#: over 3 models 2.6e3, a wrong interpolation or a missing pair stands above 1e9.
SEARCH_THRESHOLD = 1e6


@dataclass
class Memory:
    """What L-BFGS remembers between steps: curvature pairs, the last direction, step length, gradient."""

    iterations: int = 0
    pairs: list[tuple[torch.Tensor, torch.Tensor, float]] | None = None
    scale: float = 1.0
    direction: torch.Tensor | None = None
    length: float = 0.0
    gradient: torch.Tensor | None = None

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Memory:
        """Read torch's state."""
        if not state.get("n_iter"):
            return cls(pairs=[])
        ys, ss = state.get("old_dirs") or [], state.get("old_stps") or []
        rhos = [float(rho) for rho in state.get("ro") or []]
        pairs = [(y.double(), s.double(), rho) for y, s, rho in zip(ys, ss, rhos, strict=True)]
        return cls(
            iterations=int(state["n_iter"]),
            pairs=pairs,
            scale=float(state.get("H_diag", 1.0)),
            direction=state["d"].double(),
            length=float(state["t"]),
            gradient=state["prev_flat_grad"].double(),
        )


def lbfgs_step(theta: torch.Tensor, evaluate: Evaluate, memory: Memory, options: Mapping[str, Any]) -> torch.Tensor:
    """Return the weights after one `step`: up to ``max_iter`` iterations of ``theta += t * d``.

    ``d = -H g`` by the two-loop recursion over the kept pairs ``y = g' - g``, ``s = t d``, with
    ``H_0 = (y.s / y.y) I``; ``t = min(1, 1 / |g|_1) lr`` in the very first iteration, then lr, or what the strong-Wolfe
    search finds from there.

    Args:
        theta: flat weights, float64.
        evaluate: loss and flat gradient at a point.
        memory: changed.
        options: the group's options.

    Reference: Nocedal & Wright 2006, algorithms 7.4, 7.5 and 3.5, 3.6; Schmidt 2005, minFunc.
    """
    lr, most = float(options["lr"]), int(options["max_iter"])
    most_evaluations = int(options.get("max_eval") or most * 5 // 4)
    flat, still = float(options["tolerance_grad"]), float(options["tolerance_change"])
    assert memory.pairs is not None
    loss, gradient = evaluate(theta)
    evaluations = 1
    if float(gradient.abs().max()) <= flat:
        return theta
    for iteration in range(1, most + 1):
        memory.iterations += 1
        direction = _direction(gradient, memory, int(options["history_size"]))
        memory.gradient, memory.direction = gradient, direction
        memory.length = min(1.0, 1.0 / float(gradient.abs().sum())) * lr if memory.iterations == 1 else lr
        slope, previous = float(gradient @ direction), loss
        if slope > -still:
            break
        if options.get("line_search_fn"):
            search = _Search(theta, direction, loss, gradient, slope, evaluate, still)
            loss, gradient, memory.length = search.run(memory.length)
            evaluations += search.evaluations
            theta = theta + memory.length * direction
        else:
            theta = theta + memory.length * direction
            if iteration != most:
                loss, gradient = evaluate(theta)
                evaluations += 1
        if (
            iteration == most
            or evaluations >= most_evaluations
            or float(gradient.abs().max()) <= flat
            or float((memory.length * direction).abs().max()) <= still
            or abs(loss - previous) < still
        ):
            break
    return theta


def _direction(gradient: torch.Tensor, memory: Memory, most_pairs: int) -> torch.Tensor:
    """The two-loop recursion, after the last step's pair was added."""
    pairs = memory.pairs
    assert pairs is not None
    if memory.iterations == 1:
        memory.scale = 1.0
        return -gradient
    assert memory.gradient is not None
    assert memory.direction is not None
    y, s = gradient - memory.gradient, memory.length * memory.direction
    curvature = float(y @ s)
    if curvature > LEAST_CURVATURE:
        if len(pairs) == most_pairs:
            pairs.pop(0)
        pairs.append((y, s, 1.0 / curvature))
        memory.scale = curvature / float(y @ y)
    q, weights = -gradient, []
    for y, s, rho in reversed(pairs):
        weight = rho * float(s @ q)
        weights.append(weight)
        q = q - weight * y
    r = q * memory.scale
    for (y, s, rho), weight in zip(pairs, reversed(weights), strict=True):
        r = r + (weight - rho * float(y @ r)) * s
    return r


@dataclass
class _Point:
    """A trial along the search direction: step length, loss, gradient, slope."""

    t: float
    loss: float
    gradient: torch.Tensor
    slope: float


class _Search:
    """The strong-Wolfe line search: bracket a step, then zoom with cubic interpolation."""

    def __init__(
        self, theta: torch.Tensor, direction: torch.Tensor, loss: float, gradient: torch.Tensor, slope: float,
        evaluate: Evaluate, still: float,
    ) -> None:  # fmt: skip
        self._theta, self._direction, self._evaluate, self._still = theta, direction, evaluate, still
        self._start = _Point(0.0, loss, gradient, slope)
        self.evaluations = 0

    def run(self, first: float) -> tuple[float, torch.Tensor, float]:
        """Return (loss, gradient, step length) of the accepted point."""
        bracket, done, trials = self._bracket(first)
        low = self._zoom(bracket, trials) if not done else bracket[0]
        return low.loss, low.gradient, low.t

    def _at(self, t: float) -> _Point:
        self.evaluations += 1
        loss, gradient = self._evaluate(self._theta + t * self._direction)
        return _Point(t, loss, gradient, float(gradient @ self._direction))

    def _too_high(self, point: _Point) -> bool:
        return point.loss > self._start.loss + DECREASE * point.t * self._start.slope

    def _flat_enough(self, point: _Point) -> bool:
        return abs(point.slope) <= -CURVATURE * self._start.slope

    def _bracket(self, first: float) -> tuple[list[_Point], bool, int]:
        before, point = self._start, self._at(first)
        for trial in range(MOST_TRIALS):
            if self._too_high(point) or (trial > 1 and point.loss >= before.loss):
                return [before, point], False, trial
            if self._flat_enough(point):
                return [point], True, trial
            if point.slope >= 0:
                return [before, point], False, trial
            bounds = (point.t + 0.01 * (point.t - before.t), point.t * 10.0)
            before, point = point, self._at(_cubic(before, point, bounds))
        return [self._start, point], False, MOST_TRIALS

    def _zoom(self, bracket: list[_Point], trials: int) -> _Point:
        longest = float(self._direction.abs().max())
        # The search keeps both ends in place and remembers which one is lower.
        low, high = (0, 1) if bracket[0].loss <= bracket[1].loss else (1, 0)
        stuck = False
        while trials < MOST_TRIALS and abs(bracket[1].t - bracket[0].t) * longest >= self._still:
            least, most = sorted(end.t for end in bracket)
            t, margin = _cubic(bracket[0], bracket[1], (least, most)), 0.1 * (most - least)
            if min(most - t, t - least) < margin:
                if stuck or t >= most or t <= least:
                    t = most - margin if abs(t - most) < abs(t - least) else least + margin
                    stuck = False
                else:
                    stuck = True
            else:
                stuck = False
            point = self._at(t)
            trials += 1
            if self._too_high(point) or point.loss >= bracket[low].loss:
                bracket[high] = point
                low, high = (0, 1) if bracket[0].loss <= bracket[1].loss else (1, 0)
                continue
            if self._flat_enough(point):
                return point
            if point.slope * (bracket[high].t - bracket[low].t) >= 0:
                bracket[high] = bracket[low]
            bracket[low] = point
        return bracket[low]


def _cubic(one: _Point, other: _Point, bounds: tuple[float, float]) -> float:
    """Return the minimum of the cubic through two points with slopes, within bounds (Nocedal & Wright eq. 3.59)."""
    first, second = (one, other) if one.t <= other.t else (other, one)
    d1 = one.slope + other.slope - 3.0 * (one.loss - other.loss) / (one.t - other.t)
    square = d1 * d1 - one.slope * other.slope
    if square < 0:
        return sum(bounds) / 2.0
    d2 = math.sqrt(square)
    span = second.t - first.t
    t = second.t - span * (second.slope + d2 - d1) / (second.slope - first.slope + 2.0 * d2)
    return min(max(t, bounds[0]), bounds[1])
