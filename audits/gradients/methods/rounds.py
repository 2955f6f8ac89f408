"""Joint rounds: many tensors probed in one direction, at one point, until each is resolved or open."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from audits.causes import Cause
from audits.gradients.methods.localise import ROUNDING_LIMIT, Localiser
from audits.gradients.methods.probe import Probe, Prober, limit_factor
from audits.gradients.methods.romberg import FIRST_STEP
from audits.gradients.methods.rounding import mark_rounding_zeros, suspicious
from audits.gradients.verdicts import Verdict
from audits.lanes.directions import Unit
from audits.lanes.evaluation import Point
from audits.lanes.opaque import ROUGH_NOISE, is_opaque
from audits.lanes.problem import Problem
from audits.lanes.program import BranchMismatchError
from audits.outcomes import Lane, Outcome

#: First and later joint rounds for tensors that the smaller step leaves unresolved. In float32 the first step that
#: resolves anything is 0.1.
ROUND_STEPS = {Lane.FLOAT64: (FIRST_STEP, 6e-2, 0.5), Lane.FLOAT32: (0.1, 0.5)}

#: Probes of a round where the loss has float32 steps inside. The noise is 1e-9 to 1e-8 of the loss, and ten probes of a
#: direction at its best step (2.8 B where two resolve 45 B) resolve 1e-3 of the tensors with the steepest slopes; the
#: next round is without those, smoother, and goes farther out. Biases and norms, of little slope, come last.
ROUGH_PROBES = 10

#: Evaluations that rough rounds may cost; what is open then stays so.
ROUGH_BUDGET = 3000

#: Where a rough loss's noise is measured.
ROUGH_STEP = 6e-2

#: Probes of the tensors that the joint rounds leave a little above the limit: ten miss an error with the same
#: probability at 2.8 B where two do at 45 B, so that limits up to sixteen times the one that is asked come below it.
PATIENT_PROBES = 10

#: In float32 the noise is coarse and the limit of two probes, 45 B / (...), a few parts in a thousand on small nets;
#: six probes miss an error with the same probability at 4.5 B / (...).
LEAST_PROBES = {Lane.FLOAT32: 6}


class Rounds:
    """Judge tensors at a point by probes through all of them."""

    def __init__(self, problem: Problem, *, seed: int, probes: int, detection_limit: float) -> None:
        self._problem = problem
        self._seed = seed
        self._probes = max(probes, LEAST_PROBES.get(problem.lane, 1))
        self._detection_limit = detection_limit
        self.verdicts: dict[str, Verdict] = {}
        self.evaluations = 0
        self._opaque: bool | None = None

    def _units(self, *, displaced: bool) -> list[Unit]:
        """Return the directions of a point's first round."""
        return [Unit(self._seed + (1 if displaced else 0), i + 1) for i in range(self._probes)]

    def rounds(self, point: Point, names: list[str], *, displaced: bool) -> list[str]:
        """Run the joint rounds; return the tensors still open: unresolved ones and zero gradients."""
        if not names:
            return []
        mark_rounding_zeros(point, suspicious(point, names))
        prober = Prober(point, self._seed + (1 if displaced else 0))
        open_names = list(names)
        zero: list[str] = []
        for step in ROUND_STEPS[self._problem.lane]:
            if not open_names:
                break
            open_names, gave_up = self._round(prober, step, self._probes, open_names, zero, displaced)
            if gave_up:
                return [*zero, *open_names]
            if prober.rough:
                return [*self._rough_rounds(prober, open_names, zero, displaced), *zero]
        return [*open_names, *zero]

    def patiently(self, point: Point, names: list[str], *, displaced: bool) -> list[str]:
        """Probe the tensors that are nearly resolved more often, and alone; return those still open."""
        factor = limit_factor(PATIENT_PROBES) / limit_factor(self._probes)
        limits = {n: v.limit or math.inf for n in names if (v := self.verdicts.get(n)) is not None}
        near = [n for n, limit in limits.items() if factor * limit <= self._detection_limit]
        if not near or point.spread:
            return names
        prober = Prober(point, self._seed + (3 if displaced else 2))
        zero: list[str] = []
        rest, still_open = [n for n in names if n not in near], near
        for step in ROUND_STEPS[self._problem.lane]:
            before = {name: self.verdicts[name] for name in still_open}
            still_open, gave_up = self._round(prober, step, PATIENT_PROBES, still_open, zero, displaced)
            for name in still_open:  # a round at a worse step must not undo what an earlier one came to
                self.verdicts[name] = min(before[name], self.verdicts[name], key=lambda v: v.limit or math.inf)
            if gave_up or not still_open or prober.rough:
                break
        return [*rest, *still_open, *zero]

    def _rough_rounds(self, prober: Prober, names: list[str], zero: list[str], displaced: bool) -> list[str]:
        """Probe what needs it at longer steps, more often, and in smaller groups; return the tensors still open."""
        deadline = prober.point.evaluations + ROUGH_BUDGET
        groups, left = [names], []
        while groups:
            group = groups.pop(0)
            if not group or prober.point.evaluations > deadline:
                left += group
                continue
            step = prober.best_step({name: prober.rms[name] for name in group})
            still_open, gave_up = self._round(prober, step, max(self._probes, ROUGH_PROBES), group, zero, displaced)
            if gave_up or (len(group) == 1 and still_open):
                left += still_open
            elif len(still_open) < len(group):
                groups.insert(0, still_open)
            else:  # a direction through fewer tensors is smoother
                steep = sorted(still_open, key=lambda name: -prober.rms[name] * prober.slope_norms[name])
                groups += [steep[: len(steep) // 2], steep[len(steep) // 2 :]]
        return left

    def _found_rough(self, prober: Prober) -> bool:
        """Whether the noise that was just measured is float32's, from a kernel that nothing lifts."""
        point = prober.point
        if prober.rough or point.spread or self._problem.lane is not Lane.FLOAT64:
            return False
        if prober.noise_ratio <= ROUGH_NOISE:
            return False
        if self._opaque is None:
            self._opaque = is_opaque(self._problem)
        return self._opaque

    def _found_stairs(self, prober: Prober, step: float) -> bool:
        """Whether an operator inside computes in float32 on its own account, so that small steps say nothing."""
        if prober.rough or prober.point.spread or self._problem.lane is not Lane.FLOAT64:
            return False
        try:
            return prober.noise_of_stairs(step) > ROUGH_NOISE
        except BranchMismatchError:
            return False

    def _round(
        self, prober: Prober, step: float, count: int, open_names: list[str], zero: list[str], displaced: bool
    ) -> tuple[list[str], bool]:  # fmt: skip
        """Probe some tensors together; return those still open, and whether no further round makes sense.

        Verdicts of the others are kept; tensors whose gradient is zero are added to ``zero``.
        """
        point = prober.point
        scales = prober.scales(open_names, step)
        try:
            prober.measure_once(scales, step)
            prober.announce(open_names, count)
            probes = [prober.probe(scales, step) for _ in range(count)]
            if self._found_rough(prober):
                prober.coarsen(ROUGH_STEP)
                return open_names, False
        except BranchMismatchError as error:
            self._give_up(open_names, prober, f"Python branches on a value near theta: {error}", displaced)
            return [], True
        if any(probe.bound == 0.0 for probe in probes):
            assert all(probe.estimate.value == 0.0 for probe in probes)
            self._give_up(open_names, prober, "the loss is exactly constant around this point", displaced)
            return open_names, True
        exceeded = [probe for probe in probes if probe.exceeds]
        if exceeded and self._found_stairs(prober, step):
            prober.coarsen(ROUGH_STEP)
            return open_names, False
        if exceeded:
            localiser = Localiser(prober, step, count, self._detection_limit)
            found = localiser.judge(open_names, exceeded[0])
            self.verdicts.update({n: replace(v, displaced=displaced) for n, v in found.items()})
            # what exceeded and could not be confirmed may be told at another step, or where the slope is larger
            open_names = [n for n in open_names if n not in found or found[n].cause == Cause.UNCONFIRMED]
            zero += [n for n in open_names if prober.slope_norms[n] == 0]
            return [n for n in open_names if prober.slope_norms[n] > 0], False
        bounds = [probe.bound for probe in probes]
        still_open = []
        for name in open_names:
            limit = max(prober.limit(name, scales[name], bounds), ROUNDING_LIMIT)
            verdict = _joint(probes, scales[name], limit, displaced)
            known = self.verdicts.get(name)
            if prober.slope_norms[name] == 0:
                zero.append(name)
            elif limit > self._detection_limit:
                verdict = replace(verdict, outcome=Outcome.INCONCLUSIVE, cause=_unresolved(point))
                still_open.append(name)
                if prober.rough and known is not None and (known.limit or math.inf) < limit:
                    continue  # an earlier round came nearer
            self.verdicts[name] = verdict
        return still_open, False

    def _give_up(self, names: Sequence[str], prober: Prober, cause: str, displaced: bool) -> None:
        for name in names:
            self.verdicts[name] = Verdict(
                outcome=Outcome.INCONCLUSIVE,
                cause=cause,
                displaced=displaced,
                message=f"cannot judge {name!r}: {cause}",
            )


def _unresolved(point: Point) -> str:
    return Cause.NONDETERMINISTIC if point.spread else Cause.UNRESOLVED


def _joint(probes: Sequence[Probe], scale: float, limit: float, displaced: bool) -> Verdict:
    worst = max(probes, key=lambda probe: probe.residual / probe.bound)
    return Verdict(
        outcome=Outcome.PASS,
        measured=worst.autograd,
        expected=worst.estimate.value,
        error=worst.residual,
        threshold=worst.bound,
        limit=limit if math.isfinite(limit) else None,
        # |v_i| >= s/2: a single wrong element beyond 2 B / s exceeds; 4 B / s leaves room for the residual's own error
        absolute_limit=4 * worst.bound / scale,
        displaced=displaced,
        joint=True,
    )
