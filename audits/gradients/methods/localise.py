"""After an exceedance: which tensors are wrong, by halving, each judged by probes of its own."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from audits.causes import Cause
from audits.gradients.methods.concentration import find_concentration
from audits.gradients.methods.probe import Probe, Prober
from audits.gradients.methods.romberg import NOISE_WEIGHT, SHRINK
from audits.gradients.verdicts import Verdict
from audits.lanes.program import BranchMismatchError
from audits.outcomes import Outcome

#: Confirmations by independent directions before a tensor fails, and how many directions may be tried for them.
CONFIRMATIONS = 2
ATTEMPTS = 5

#: A relative error below this is rounding inside one operator, not a wrong formula (known: torch's float64
#: hardsigmoid backward multiplies by a float32 1/6, 8.5e-8 off; celu's by a float32 1/alpha).
ROUNDING_ERROR = 1e-6

#: What is really found in spite of that rule, with probability 99.9 %: the root mean square of 5 probes' residuals of
#: an error e is below 0.2 ||s e|| with probability 1e-3 (chi-square with 5 degrees of freedom below 0.2).
ROUNDING_LIMIT = 5 * ROUNDING_ERROR

#: Steps, relative to the round's, at which a crossed kink has to be out of sight.
KINK_SHRINKS = (64.0, 512.0)

#: A kink's jump stands this far above the noise, and changes by no more than this share when the step shrinks eightfold
#: (the jump of a smooth function, h f'', changes by 87 %).
JUMP_OVER_NOISE = 10.0
JUMP_DRIFT = 0.1

#: Fresh directions along which autograd's value must lie between the one-sided slopes. A wrong gradient's value falls
#: between them by chance along some: with two directions alone a gradient off by 1.7 passed in 2 of 48 runs.
SUBGRADIENT_DIRECTIONS = 10

#: Steps at which an exceedance must persist where the loss is rough: there an eighth of the step has eight times the
#: noise, and at half of it a truncation error of the sixth order is gone as well.
ROUGH_SHRINK = 2.0

#: Evaluations one failing phase may cost; beyond them the rest is inconclusive, not forgotten.
BUDGET = 20_000


@dataclass(frozen=True)
class _Tried:
    """The probes of one tensor, those of them that were confirmed, and the limit they give."""

    scales: dict[str, float]
    slope: float
    probes: list[Probe]
    confirmed: list[Probe]
    limit: float

    @property
    def typical(self) -> float:
        """The root mean square of the residuals."""
        return float((sum(p.residual**2 for p in self.probes) / len(self.probes)) ** 0.5)

    @property
    def worst(self) -> Probe | None:
        """The probe that exceeds its bound with the largest residual."""
        return _worst(self.probes)


class Localiser:
    """Judge tensors one by one where a joint probe exceeded its bound."""

    def __init__(self, prober: Prober, step: float, probes: int, detection_limit: float) -> None:
        self._prober = prober
        self._step = step
        self._probes = probes
        self._detection_limit = detection_limit
        self._shrink = ROUGH_SHRINK if prober.rough else SHRINK
        self._found: dict[str, Verdict] = {}
        self._deadline = prober.point.evaluations + BUDGET

    def judge(self, names: Sequence[str], exceeded: Probe) -> dict[str, Verdict]:
        """Return verdicts of the tensors that could be settled; the others stay open (unresolved or zero)."""
        self._split(list(names), exceeded)
        return self._found

    def _split(self, names: list[str], exceeded: Probe) -> None:
        if len(names) == 1:
            with self._prober.point.gradients.holding(names):
                self._leaf(names[0])
            return
        middle = len(names) // 2
        any_exceeded = False
        clean: list[str] = []
        for half in (names[middle:], names[:middle]):
            if self._prober.point.evaluations > self._deadline:
                self._inconclusive(half, "not judged within the budget of evaluations", exceeded)
                any_exceeded = True
                continue
            probes = self._joint(half)
            if probes is None:
                any_exceeded = True
            elif probes[-1].exceeds:
                any_exceeded = True
                self._split(half, probes[-1])
            else:
                clean += half
        if not any_exceeded:
            self._unconfirmed(clean, exceeded)

    def _joint(self, names: list[str]) -> list[Probe] | None:
        """Probe until one exceeds; pass verdicts for those a clean group resolves."""
        scales = self._prober.scales(names, self._step)
        probes: list[Probe] = []
        try:
            self._prober.measure_once(scales, self._step)
            self._prober.announce(names, self._probes)
            for _ in range(self._probes):
                probes.append(self._prober.probe(scales, self._step))
                if probes[-1].exceeds:
                    return probes
        except BranchMismatchError as error:
            self._inconclusive(names, f"Python branches on a value near theta: {error}", None)
            return None
        for name in names:
            limit = max(self._prober.limit(name, scales[name], [probe.bound for probe in probes]), ROUNDING_LIMIT)
            if limit <= self._detection_limit:
                self._found[name] = _verdict(Outcome.PASS, probes[-1], limit=limit, joint=len(names) > 1)
        return probes

    def _leaf(self, name: str, *, again: bool = False) -> None:
        """Confirm a tensor's error along fresh directions and smaller steps."""
        tried = self._try(name)
        if tried is None:
            return
        spread = self._prober.point.spread
        if len(tried.probes) == ATTEMPTS and tried.slope > 0 and tried.typical < ROUNDING_ERROR * tried.slope:
            self._settle_small(name, tried)
        elif not tried.confirmed and not again and self._remeasured(tried.scales):
            self._leaf(name, again=True)
        elif not any(probe.exceeds for probe in tried.probes):
            if tried.limit <= self._detection_limit:
                self._found[name] = _verdict(Outcome.PASS, tried.probes[-1], limit=tried.limit)
        elif not spread and self._kink(name, tried.scales, tried.confirmed):
            return
        elif len(tried.confirmed) < CONFIRMATIONS or spread:
            self._inconclusive([name], Cause.NONDETERMINISTIC if spread else Cause.UNCONFIRMED, tried.worst)
        else:
            probe = max(tried.confirmed, key=lambda p: p.residual)
            self._found[name] = _verdict(Outcome.FAIL, probe, limit=tried.limit, cause=Cause.WRONG_GRADIENT)

    def _try(self, name: str) -> _Tried | None:
        """Probe a tensor until its error is confirmed or the attempts are used up; None where Python branches."""
        scales = self._prober.scales([name], self._step)
        slope = scales[name] * self._prober.slope_norms[name]
        confirmed: list[Probe] = []
        probes: list[Probe] = []
        try:
            for _ in range(ATTEMPTS):
                probe = self._prober.probe(scales, self._step)
                probes.append(probe)
                if probe.exceeds and self._persists(probe):
                    confirmed.append(probe)
                clear = all(p.residual > ROUNDING_LIMIT * slope for p in confirmed)
                if len(confirmed) == CONFIRMATIONS and clear:
                    break
        except BranchMismatchError as error:
            worst = _worst(probes)
            self._inconclusive([name], f"Python branches on a value near theta: {error}", worst)
            return None
        bounds = [p.bound for p in probes[: self._probes]]
        limit = max(self._prober.limit(name, scales[name], bounds), ROUNDING_LIMIT)
        return _Tried(scales, slope, probes, confirmed, limit)

    def _settle_small(self, name: str, tried: _Tried) -> None:
        """Settle an error so small that it is rounding, unless it sits in a few elements alone."""
        typical, limit = tried.typical / tried.slope, tried.limit
        few = find_concentration(self._prober, name, self._step) if tried.confirmed else None
        if few is not None:
            self._found[name] = _verdict(
                Outcome.FAIL, few.probe, limit=limit, cause=Cause.WRONG_FEW_ELEMENTS.at(few.describe()),
                message=f"the gradient of {name!r} is wrong in {few.describe()}: off there by {few.relative:.1e} "
                f"relative, {typical:.1e} of the whole tensor",
            )  # fmt: skip
        elif limit <= self._detection_limit:
            self._found[name] = _verdict(
                Outcome.PASS, max(tried.probes, key=lambda p: p.residual), limit=limit,
                cause=Cause.ROUNDING_INSIDE_AN_OP,
                message=f"the gradient of {name!r} is off by {typical:.1e} relative: rounding inside an operator, not "
                "a wrong formula",
            )  # fmt: skip

    def _remeasured(self, scales: dict[str, float]) -> bool:
        return self._prober.remeasure(self._prober.direction(scales), self._step)

    def _kink(self, name: str, scales: dict[str, float], confirmed: list[Probe]) -> bool:
        """Settle a tensor at a kink whose branch could not be frozen, if a rule does.

        A kink that was crossed: the error vanishes below some step, for fresh directions, and the tensor stays resolved
        there. A kink at theta itself: the one-sided slopes differ by a jump that does not depend on the step (a smooth
        function's goes to zero with it), and autograd's value lies between them.
        """
        if confirmed:
            fresh_ones = (self._prober.probe(scales, self._step) for _ in range(SUBGRADIENT_DIRECTIONS))
            if not all(self._is_subgradient(probe) for probe in itertools.chain(confirmed, fresh_ones)):
                return False
            probe, cause = confirmed[0], Cause.SUBGRADIENT
        else:
            probes = []
            for shrink in KINK_SHRINKS:
                for _ in range(self._probes):
                    fresh = self._prober.probe(scales, self._step)
                    probes.append(self._prober.again(fresh, self._step / shrink))
            if any(probe.exceeds for probe in probes):
                return False
            probe, cause = probes[-1], Cause.KINK_CROSSED
        bounds = [p.bound for p in (confirmed or probes)][-self._probes :]
        limit = max(self._prober.limit(name, scales[name], bounds), ROUNDING_LIMIT)
        if limit > self._detection_limit:
            return False
        self._found[name] = _verdict(
            Outcome.PASS, probe, limit=limit, cause=cause,
            message=f"the gradient of {name!r} is the loss's derivative ({cause}; its operator has no branch rule)",
        )  # fmt: skip
        return True

    def _is_subgradient(self, probe: Probe) -> bool:
        point, direction = self._prober.point, probe.direction
        slopes = []
        for step in (self._step / SHRINK, self._step / SHRINK**2):
            forward = (point.along(direction, step) - point.value) / step
            backward = (point.value - point.along(direction, -step)) / step
            slopes.append((forward, backward, NOISE_WEIGHT * self._prober.sigma / step))
        (forward_far, backward_far, _), (forward, backward, noise) = slopes
        # what a one-sided slope still changes with the step is its own truncation
        slack = noise + max(abs(forward - forward_far), abs(backward - backward_far))
        if not min(forward, backward) - slack <= probe.autograd <= max(forward, backward) + slack:
            return False
        jump, jump_far = forward - backward, forward_far - backward_far
        return abs(jump) > JUMP_OVER_NOISE * slack and abs(jump - jump_far) <= JUMP_DRIFT * abs(jump)

    def _persists(self, probe: Probe) -> bool:
        """Whether the residual stays along the same direction at smaller steps: a truncation error would not.

        At h/8 it must exceed again. At h/64 the noise is 64 times larger: it must exceed, or be unable to tell. (h/2
        and h/4 where the loss is rough.)
        """
        nearer = self._prober.again(probe, probe.estimate.step / self._shrink)
        if not nearer.exceeds:
            return False
        nearest = self._prober.again(probe, probe.estimate.step / self._shrink**2)
        change = abs(nearest.estimate.value - probe.estimate.value)
        return nearest.exceeds or change <= nearest.bound + probe.bound

    def _unconfirmed(self, names: Sequence[str], exceeded: Probe) -> None:
        """No half exceeds although the whole did: an error spread thin, or the bound was too small."""
        slopes = [self._prober.slope_norms[n] * self._prober.scales(names, self._step)[n] for n in names]
        total = sum(slope**2 for slope in slopes) ** 0.5
        if total > 0 and exceeded.residual / total < ROUNDING_ERROR:
            return  # each half was certified by its own probes; what is left is rounding
        try:
            if not self._persists(exceeded):
                return  # so it was, and what exceeded was truncation: gone at smaller steps along the same direction
            larger = self._prober.remeasure(exceeded.direction, self._step)
            if larger and not self._prober.again(exceeded, exceeded.estimate.step).exceeds:
                for name in names:  # certified by too small a noise: open for the next round
                    self._found.pop(name, None)
                return
        except BranchMismatchError:
            pass
        self._inconclusive(names, Cause.UNCONFIRMED, exceeded)

    def _inconclusive(self, names: Sequence[str], cause: str, probe: Probe | None) -> None:
        for name in names:
            message = f"cannot judge {name!r}: {cause}"
            if probe is None:
                self._found[name] = Verdict(outcome=Outcome.INCONCLUSIVE, cause=cause, message=message)
            else:
                self._found[name] = _verdict(Outcome.INCONCLUSIVE, probe, cause=cause, message=message, joint=True)


def _worst(probes: Sequence[Probe]) -> Probe | None:
    return max((p for p in probes if p.exceeds), key=lambda p: p.residual, default=None)


def _verdict(
    outcome: Outcome, probe: Probe, *, limit: float | None = None, cause: str | None = None, message: str = "",
    joint: bool = False,
) -> Verdict:  # fmt: skip
    return Verdict(
        outcome=outcome, measured=probe.autograd, expected=probe.estimate.value, error=probe.residual,
        threshold=probe.bound, limit=limit, cause=cause, message=message, joint=joint,
    )  # fmt: skip
