"""The default method: all tensors in one direction, certified by measured noise, told apart only on failure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from audits.causes import Cause
from audits.gradients.methods.probe import Prober
from audits.gradients.methods.rounding import mark_rounding_zeros
from audits.gradients.methods.rounds import Rounds
from audits.gradients.verdicts import Verdict, describe
from audits.lanes.evaluation import Point
from audits.lanes.problem import LaneError
from audits.lanes.program import BranchMismatchError
from audits.outcomes import Outcome

#: The displaced point is this many rms away from theta, per element (normal); a tenth of it if the loss is not finite.
DISPLACEMENTS = (0.1, 0.01)

#: Where a slope is too small to be seen even there, the tensors it concerns go on by so many rms, one size after the
#: other: attention as it is initialised (std 0.02) is flat, its queries' and keys' slopes grow with each other's size,
#: 1e-10 of the loss at theta and 1e-6 where those and the layers before them are ten times as large (mobilebert).
FAR_DISPLACEMENTS = (1.0, 3.0, 10.0)

#: Far out, what can be seen depends on the point that was drawn, and another audit draws another. A tensor passes there
#: where an eighth of the error that is asked for would be seen, and states that one: at a loss + 1e9, errors of the
#: limit at the point itself were found in 5 of 8 audits with another seed, of four times it in 8 of 8.
FAR_MARGIN = 8.0


class Certifier(Rounds):
    """Judge every tensor of a problem: at theta, and what is open there a little way off."""

    def run(self, names: Sequence[str]) -> Point:
        """Judge the tensors; `verdicts` holds the result. Returns the point at theta.

        Raises:
            LaneError: the loss cannot be evaluated in this lane.
        """
        point = self.start()
        judged = self.refuse_non_finite(point, names)
        try:
            leftover = self.patiently(point, self.rounds(point, judged, displaced=False), displaced=False)
            if leftover:
                self.displace(point, leftover)
        finally:
            point.restore()
            self.evaluations += point.evaluations
        return point

    def start(self) -> Point:
        """Return the point at theta.

        Raises:
            LaneError: the loss there is not finite.
        """
        point = Point(self._problem, units=self._units(displaced=False))
        if not math.isfinite(point.value):
            point.restore()
            raise LaneError(f"the loss is {point.value} in this lane")
        return point

    def refuse_non_finite(self, point: Point, names: Sequence[str]) -> list[str]:
        """Fail the tensors whose gradient is NaN or infinite; return the others."""
        judged = []
        for name in names:
            gradient = None if point.gradients.all_finite(name) else point.gradients[name]
            if gradient is not None:
                bad = int((~torch.isfinite(gradient)).sum())
                self.verdicts[name] = Verdict(
                    outcome=Outcome.FAIL,
                    cause=Cause.NON_FINITE_GRADIENT,
                    message=f"autograd gives {bad} of {gradient.numel()} elements of the gradient of {name!r} as NaN "
                    f"or infinity although the loss is {point.value:.6g}",
                )
            else:
                judged.append(name)
        return judged

    def displace(self, point: Point, names: list[str]) -> None:
        """Judge unresolved and zero gradients again a little way off, where they need not vanish."""
        before = {name: self.verdicts.get(name) for name in names}
        mark_rounding_zeros(point, names)
        here = self._zeros(point, names)
        moved = self._displaced_point(point)
        if moved is None:
            for name in names:
                self._settle(name, before[name], None, set())
            return
        judged, leftover, there = self._judge_there(moved, names)
        for name in names:
            if name in leftover or name not in judged:
                at_displaced = self.verdicts[name] if name in judged else None
                self._settle(name, before[name], at_displaced, here & there)
        still_open = [n for n in leftover if n not in here and n not in there]
        self._go_far(point, still_open, together=[n for n in names if n not in here])

    def _judge_there(self, moved: Point, names: Sequence[str]) -> tuple[list[str], list[str], set[str]]:
        """Judge tensors at a displaced point; return those it could be done for, those still open, and zeros there."""
        try:
            judged = [n for n in names if moved.gradients.all_finite(n)]
            leftover = self.patiently(moved, self.rounds(moved, judged, displaced=True), displaced=True)
            mark_rounding_zeros(moved, leftover)
            return judged, leftover, self._zeros(moved, leftover)
        finally:
            moved.restore()
            self.evaluations += moved.evaluations

    def _go_far(self, point: Point, names: list[str], *, together: Sequence[str]) -> None:
        """Judge what has a slope, but too small a one, where all that theta left open is larger: they grow together."""
        for size in FAR_DISPLACEMENTS:
            names = [n for n in names if self.verdicts[n].cause in (Cause.UNRESOLVED, Cause.UNCONFIRMED)]
            moved = self._displaced_point(point, sizes=(size,), names=together) if names else None
            if moved is None:
                continue
            before = {name: self.verdicts[name] for name in names}
            judged, leftover, _ = self._judge_there(moved, names)
            for name in names:
                found = self.verdicts[name]
                if name in leftover or name not in judged:
                    self.verdicts[name] = before[name]
                elif found.outcome is Outcome.PASS:
                    seen = found.limit is not None and FAR_MARGIN * found.limit <= self._detection_limit
                    self.verdicts[name] = replace(found, limit=self._detection_limit) if seen else before[name]

    def _displaced_point(
        self, point: Point, *, sizes: Sequence[float] = DISPLACEMENTS, names: Sequence[str] | None = None
    ) -> Point | None:
        prober = Prober(point, self._seed)
        point.restore()
        for size in sizes:
            sizes_by_name = {name: size * prober.rms[name] for name in (point.names if names is None else names)}
            try:
                moved = Point(
                    self._problem, sizes=sizes_by_name, seed=self._seed + 17, origin=point,
                    units=self._units(displaced=True),
                )  # fmt: skip
            except (RuntimeError, LaneError, BranchMismatchError, ValueError):
                point.restore_from_theta()
                continue
            if math.isfinite(moved.value):
                return moved
            moved.restore()
        return None

    def _zeros(self, point: Point, names: Sequence[str]) -> set[str]:
        return {name for name in names if name in point.rounded or point.gradients.norms[name] == 0.0}

    def _settle(self, name: str, here: Verdict | None, there: Verdict | None, zero: set[str]) -> None:
        """Say what a gradient is that neither point resolves: zero to rounding, or unresolved."""
        known = there or here
        assert known is not None
        if name in zero and known.error is not None and (there is not None):
            limit = known.absolute_limit
            self.verdicts[name] = replace(
                known,
                outcome=Outcome.PASS,
                limit=None,
                displaced=True,
                cause=Cause.ZERO_GRADIENT,
                message=f"the gradient of {name!r} is zero, here and at a displaced point, and so is the loss's "
                f"derivative (absolute limit {limit:.3g})",
            )
            return
        cause = known.cause if known.outcome is Outcome.INCONCLUSIVE and known.cause else Cause.UNRESOLVED
        judged = replace(known, outcome=Outcome.INCONCLUSIVE, cause=cause)
        self.verdicts[name] = replace(judged, message=known.message or describe(name, judged))
