"""An update in one lane after the other, until every term of its rule is large enough to see."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from audits.live.subject import LivePhase
from audits.outcomes import Lane
from audits.updates.compare import (
    COARSE_RESOLUTION,
    RESOLUTION,
    SLACK,
    THRESHOLDS,
    Judgement,
    deviation,
    judge,
    real_dtype,
    resolution,
)
from audits.updates.compare import to_double as double
from audits.updates.judge.conditioning import judge_conditioned
from audits.updates.judge.expected import LOW_PRECISION, Expected
from audits.updates.judge.kernels import limit_beside_scalars
from audits.updates.judge.masters import masters_of
from audits.updates.judge.replay import LaneCache
from audits.updates.record.calls import Call
from audits.updates.rules import Rule, State
from audits.updates.rules.base import SCALARS
from audits.updates.update_rows import wide


class Expect(Protocol):
    """Says what a rule expects of a call in one parameter, and advances the states."""

    def __call__(
        self, call: Call, name: str, states: dict[str, State], theta: torch.Tensor | None = None,
        lane: torch.dtype | None = None,
    ) -> Expected | None:  # fmt: skip
        """Return it, or None where the parameter received no gradient."""
        ...


@dataclass
class Finding:
    """How an update was judged: in which lane last, how far off, by what, and each term's smallest visible error."""

    lane: Lane
    judged: Judgement
    limits: dict[str, float]
    reference: Expected
    scaled: bool = False

    def after(self, limits: Mapping[str, float]) -> Finding:
        """Return it with the limits of the lanes before it: a term is resolved when it is in any."""
        self.limits = {term: min(limit, self.limits.get(term, limit)) for term, limit in limits.items()}
        return self


class CloserLook:
    """Judges updates lane by lane.

    Args:
        rule: the rule.
        phase: whose optimizer.
        lanes: its calls so far, in other dtypes.
        expect: what the rule expects.
    """

    def __init__(self, rule: Rule, phase: LivePhase, lanes: LaneCache, expect: Expect) -> None:
        self._rule, self._phase, self._expect = rule, phase, expect
        self.lanes = lanes

    def find(self, lane: Lane, dtype: torch.dtype, actual: torch.Tensor, reference: Expected) -> Finding:
        """Judge an update in a lane and say how much of each term would show there.

        Args:
            lane: the lane.
            dtype: of its weights.
            actual: the update made, float64.
            reference: the rule's.
        """
        judged = judge_conditioned(self._rule, actual, reference, dtype, (reference.size, reference.length))
        theta = reference.size
        if self._rule.inside is not None:
            inside = self._rule.inside
            theta = max(theta, inside(reference.theta, double(reference.gradient), reference.before, reference.options))
        finding = self.limited(lane, dtype, judged, reference, theta)
        if lane is Lane.FLOAT64 and judged.met and reference.options.get(SLACK):
            self._beside_scalars(finding.limits, actual, reference)
        scatters = self._rule.rounded and reference.noise  # Muon's groups that AdamW steps do not
        if scatters and (not judged.met or self.unresolved(reference, finding)):
            return self._rounded_alike(lane, dtype, actual, reference) or finding
        return finding

    def _rounded_alike(
        self, lane: Lane, dtype: torch.dtype, actual: torch.Tensor, reference: Expected
    ) -> Finding | None:
        """Judge a coarse rule by code that rounds where it does; None where they do not come out alike.

        There the update agrees to the weights' own rounding, and no scatter hides a term.
        """
        fine = replace(self._rule, relative=None, cosine=None, noise=None)

        def there(value: Any) -> Any:
            return value.to(actual.device, dtype) if isinstance(value, torch.Tensor) else value

        theta, gradient = reference.theta.to(actual.device), there(double(reference.gradient))
        for rounded in self._rule.rounded:
            state = {key: there(value) for key, value in reference.before.items()}
            update = rounded(theta, gradient, state, reference.options).to(reference.update.device)
            found = deviation(actual, update, reference.theta, dtype, (reference.size, reference.length))
            judged = judge(found, fine, dtype, reference.options)
            if judged.met:
                limits = {
                    term: resolution(fine, dtype, reference.options, reference.size, reference.length, size)
                    for term, size in reference.terms.items()
                }
                return Finding(lane, judged, limits, replace(reference, update=update, noise=0.0))
        return None

    def limited(
        self, lane: Lane, dtype: torch.dtype, judged: Judgement, reference: Expected, theta: float
    ) -> Finding:  # fmt: skip
        """Return a judgement with what each term of the rule would have shown in that lane.

        Args:
            lane: the lane.
            dtype: of its weights.
            judged: the judgement.
            reference: the rule's update; its sizes count.
            theta: rms of what is rounded.
        """
        rule, full = self._rule, reference.length
        if rule.found and rule.noise is None and judged.met and judged.threshold == THRESHOLDS[dtype][0]:
            # The tolerance for code that computes in float32 was not called upon: it agrees to the dtype's rounding.
            rule = replace(rule, relative=None)
        limits = {
            term: resolution(rule, dtype, reference.options, theta, full, size, reference.noise)
            for term, size in reference.terms.items()
        }
        return Finding(lane, judged, limits, reference)

    def _beside_scalars(self, limits: dict[str, float], actual: torch.Tensor, reference: Expected) -> None:
        """Bound what is left of a small term where the implementation's scalars are rounded."""
        outside = {"decay": {"weight_decay": 0.0}, "momentum": self._rule.momentum}
        for term, limit in limits.items():
            if term in outside and limit > RESOLUTION and SCALARS in reference.options:
                eps = torch.finfo(torch.float64).eps
                found = limit_beside_scalars(self._rule, actual - reference.update, reference, outside[term], eps)
                limits[term] = min(limit, found)

    def unresolved(self, reference: Expected, finding: Finding) -> list[str]:
        """Return the terms of the rule of which a hundredth (half, for a coarse rule) would not have shown."""
        if self._rule.noise is not None:
            # How momentum enters is below the scatter of Newton-Schulz on gradients that resemble each other; the
            # buffer itself is judged exactly by update.state, its use by the probe's unlike gradients.
            return [t for t, least in finding.limits.items() if t != "momentum" and not least <= COARSE_RESOLUTION]
        return [term for term, smallest in finding.limits.items() if not smallest <= RESOLUTION]

    def look_closer(self, call: Call, expected: dict[str, Expected], found: dict[str, Finding]) -> None:
        """Judge what a lane cannot resolve in the next one; a term is resolved when it is in any lane.

        float32 copies for low-precision weights, float64 copies, and last float64 copies scaled down to the size of the
        update, where even an update of 1e-18 shows all its digits (but not its decay, which the others show).
        """

        def still_open() -> list[str]:
            return [n for n, f in found.items() if f.judged.met and self.unresolved(expected[n], f)]

        # Master copies are in float32 whatever the weights are: a float64 copy of the weights shows no more than they.
        lanes = ((Lane.FLOAT32, torch.float32), (Lane.FLOAT64, torch.float64))
        for lane, dtype in lanes[:1] if masters_of(self._phase.recipe.optimizer) else lanes:
            names = [
                n for n in still_open() if dtype is torch.float64 or real_dtype(call.before[n].dtype) in LOW_PRECISION
            ]
            if not names:
                continue
            try:
                updates = self.lanes.updates(dtype)
            except Exception:  # a kernel for the native dtype only: that lane shows nothing, and its terms stay open
                continue
            references = self._references(dtype, expected, names)
            for name in names:
                self._merge(found, name, self.find(lane, dtype, updates[name], references[name]))
        if names := still_open():
            try:
                updates, references = self._replayed_small()
            except Exception:
                return
            for name in names:
                finding = self.find(Lane.FLOAT64, torch.float64, updates[name], references[name])
                finding.scaled = True
                self._merge(found, name, finding)

    def _references(
        self, dtype: torch.dtype, expected: dict[str, Expected], names: list[str]
    ) -> Mapping[str, Expected]:  # fmt: skip
        """Return the references of a lane: others than the native ones where a kernel's scalars are finer there."""
        if not any(SCALARS in expected[name].options for name in names):
            return expected
        states: dict[str, State] = {}
        found: dict[str, Expected] = {}
        for call in self.lanes.history:
            for name in names:
                reference = self._expect(call, name, states, lane=dtype)
                if reference is not None:
                    found[name] = reference
        return found

    def _merge(self, found: dict[str, Finding], name: str, closer: Finding) -> None:
        before = found[name].limits
        found[name] = closer.after(before)

    def _replayed_small(self) -> tuple[dict[str, torch.Tensor], dict[str, Expected]]:
        """Return the last call's updates on scaled weights, and the references for those weights."""
        replay = self.lanes.fresh(torch.float64)
        sizes: dict[str, State] = {}
        states: dict[str, State] = {}
        updates: dict[str, torch.Tensor] = {}
        references: dict[str, Expected] = {}
        for call in self.lanes.history:
            weights, references = dict(call.before), {}
            for name in self.lanes.part:
                size = self._expect(call, name, sizes, lane=torch.float64)
                if size is None:
                    continue
                scale = min(1.0, size.length / size.size) if size.size else 1.0
                if self._rule.noise is not None and size.terms.get("decay"):
                    # A coarse rule's decay shows where it is as large as the rest of the update.
                    scale = size.terms.get("gradient", 0.0) / size.terms["decay"]
                weights[name] = call.before[name].to(wide(call.before[name].dtype)) * scale
                reference = self._expect(call, name, states, double(weights[name]), torch.float64)
                assert reference is not None
                references[name] = reference
            updates = replay.step(weights, call.gradients, call.options)
        return updates, references
