"""Every recorded optimizer step against the reference rule: `update.rule`, `.state`, `.lost-to-rounding`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from audits.moulds import callable_name, declared_hook, own_step, patched_step
from audits.optimizers import optimizer_class
from audits.outcomes import Lane, Outcome, ResultRow
from audits.subject import LivePhase, Subject
from audits.updates.apply import reference_state, rule_for
from audits.updates.attributes import shared_state
from audits.updates.coarse_rows import step_rows
from audits.updates.coarse_state import coarse_state
from audits.updates.compare import (
    COARSE_RESOLUTION,
    RESOLUTION,
    SLACK,
    THRESHOLDS,
    Judged,
    real_dtype,
    resolution,
    rms,
)
from audits.updates.compare import to_double as double
from audits.updates.conditioning import judge_conditioned
from audits.updates.diagnose import explain
from audits.updates.expected import LOW_PRECISION, Expected, expect, state_error
from audits.updates.hook_watch import cure
from audits.updates.kernels import limit_beside_scalars
from audits.updates.lost import LOST_SHARE, lost_share, whole_step
from audits.updates.masters import masters_of, seen_by_masters
from audits.updates.recorder import Call
from audits.updates.relations import RELATIONS, verdict_of
from audits.updates.replay import Replays, parts_of
from audits.updates.rows import norm, row, wide
from audits.updates.rules import Rule, State
from audits.updates.rules.base import DECLARE, SCALARS
from audits.updates.state_names import IN_GROUP, state_names


@dataclass
class Finding:
    """How an update was judged: in which lane last, how far off, by what, and each term's smallest visible error."""

    lane: Lane
    judged: Judged
    limits: dict[str, float]
    reference: Expected
    scaled: bool = False


class RuleJudge:
    """Judges the calls of one phase in order; the reference state runs free from the captured or fresh one.

    Args:
        subject: the model under audit.
        phase: the phase.
        with_state: whether the run began from the captured state.
    """

    def __init__(self, subject: Subject, phase: LivePhase, *, with_state: bool = True) -> None:
        self._subject = subject
        self._phase = phase
        self.rule = rule_for(subject, phase)
        self._coarse = None if self.rule is None else coarse_state(phase, self.rule)
        self._captured = phase.recipe.optimizer.state if with_state and not phase.starts_fresh else {}
        self._shared = shared_state(phase) if self._captured else {}
        self._with_state = with_state
        names = masters_of(phase.recipe.optimizer)
        self._masters = {n: s[k] for n, s in self._captured.items() for k in names if k in s}
        self._state: dict[str, State] = {}
        self._moved = 0.0
        self._replays = Replays(phase.recipe.optimizer, self._captured)

    @cached_property
    def _names(self) -> Mapping[str, str | None]:
        """The optimizer's names of what the rule carries on; found by steps of its own, after the user's first one."""
        return state_names(self._phase, self.rule) if self.rule is not None and self.rule.found else {}

    @property
    def _nameless(self) -> list[str]:
        """What the rule carries from step to step and the captured state holds under no name that is known."""
        return [key for key, name in self._names.items() if name is None] if self._captured else []

    def rows(self, call: Call) -> Iterator[ResultRow]:
        """Yield the rows of one call."""
        wanted = [n for n in dict.fromkeys(call.options) if self._subject.settings.wants_parameter(n)]
        if self.rule is None:
            for parameter in wanted:
                yield self._without_rule(call, parameter)
            return
        if self._coarse is not None:
            yield from step_rows(self._subject, self._phase, self.rule, self._coarse, call, wanted)
            yield from (self._without_gradient(call, n) for n in wanted if call.gradients.get(n) is None)
            return
        if call.state_before is not None:  # a declared hook wrote there: the rule goes on from what it wrote
            self._state, self._captured = {}, call.state_before
            self._replays = Replays(self._phase.recipe.optimizer, self._captured)
        if nameless := self._nameless:
            keys = " and ".join(nameless)
            for parameter in wanted:
                message = (f"{parameter}: the captured state holds {keys} of {self.rule.title} under no name that is "
                           "known: judged from fresh state alone, in this step and by optimizer.probe")  # fmt: skip
                yield self._row(
                    "update.rule", Outcome.INCONCLUSIVE, message, call, parameter, cause="state under other names"
                )
            return
        if masters := masters_of(self._phase.recipe.optimizer):
            held = self._masters if self._with_state else {}
            call, self._masters, left = seen_by_masters(call, masters, held)
            for parameter in left:
                message = f"{parameter} is not the rounding of its master copy in the optimizer's state"
                yield self._row("update.rule", Outcome.FAIL, message, call, parameter, lane=Lane.NATIVE)
        self._replays.history.append(call)
        self._moved = whole_step(call)
        for part in parts_of(wanted, {n: call.before[n].numel() for n in wanted}):
            self._replays.turn_to(part)
            yield from self._rows_of(call, part)

    def _rows_of(self, call: Call, wanted: tuple[str, ...]) -> Iterator[ResultRow]:
        assert self.rule is not None
        expected = {n: e for n in wanted if (e := self._expect(self.rule, call, n, self._state)) is not None}
        found: dict[str, Finding] = {}
        lengths: dict[str, float] = {}
        for name, reference in expected.items():
            actual = double(call.moved(name)).sub_(reference.theta)
            lengths[name] = rms(actual)
            found[name] = self._find(Lane.NATIVE, real_dtype(call.before[name].dtype), actual, reference)
        self._look_closer(call, expected, found)
        for name in wanted:
            if name not in expected:
                yield self._without_gradient(call, name)
                continue
            yield self._rule_row(call, name, expected[name], found[name], lengths[name])
            yield from self._state_rows(call, name, expected[name])
            yield self._rounding_row(call, name, expected[name])

    def _expect(
        self,
        rule: Rule,
        call: Call,
        name: str,
        states: dict[str, State],
        theta: torch.Tensor | None = None,
        lane: torch.dtype | None = None,
    ) -> Expected | None:
        if name not in states:
            held = {**self._shared, **self._captured.get(name, {})}
            states[name] = reference_state(held, call.before[name].device, self._names)
            if self._names.get("step") == IN_GROUP:  # a rule of torch's would count from the state alone
                options = call.options[name]
                states[name]["step"] = float(options.get("step", options.get("k", 0.0)))
        state = states[name]
        return expect(rule, self._phase, call, name, state, theta, lane)

    def _find(self, lane: Lane, dtype: torch.dtype, actual: torch.Tensor, reference: Expected) -> Finding:
        assert self.rule is not None
        judged = judge_conditioned(
            self.rule, actual, reference.update, reference.theta, reference.gradient, reference.before,
            reference.options, dtype, reference.noise, (reference.size, reference.length),
        )  # fmt: skip
        theta, full = reference.size, reference.length
        rule = self.rule
        if rule.inside is not None:
            theta = max(
                theta, rule.inside(reference.theta, double(reference.gradient), reference.before, reference.options)
            )
        if rule.found and rule.noise is None and judged.met and judged.threshold == THRESHOLDS[dtype][0]:
            # The tolerance for code that computes in float32 was not called upon: it agrees to the dtype's rounding.
            rule = replace(rule, relative=None)
        limits = {
            term: resolution(rule, dtype, reference.options, theta, full, size, reference.noise)
            for term, size in reference.terms.items()
        }
        if lane is Lane.FLOAT64 and judged.met and reference.options.get(SLACK):
            self._beside_scalars(limits, actual, reference)
        return Finding(lane, judged, limits, reference)

    def _beside_scalars(self, limits: dict[str, float], actual: torch.Tensor, reference: Expected) -> None:
        """Bound what is left of a small term where the implementation's scalars are rounded."""
        assert self.rule is not None
        outside = {"decay": {"weight_decay": 0.0}, "momentum": self.rule.momentum}
        for term, limit in limits.items():
            if term in outside and limit > RESOLUTION and SCALARS in reference.options:
                found = limit_beside_scalars(
                    self.rule, actual - reference.update, reference.theta, reference.gradient, reference.before,
                    reference.options, outside[term], torch.finfo(torch.float64).eps,
                )  # fmt: skip
                limits[term] = min(limit, found)

    def _unresolved(self, reference: Expected, finding: Finding) -> list[str]:
        """Return the terms of the rule of which a hundredth (half, for a coarse rule) would not have shown."""
        assert self.rule is not None
        if self.rule.noise is not None:
            # How momentum enters is below the scatter of Newton-Schulz on gradients that resemble each other; the
            # buffer itself is judged exactly by update.state, its use by the probe's unlike gradients.
            return [t for t, least in finding.limits.items() if t != "momentum" and not least <= COARSE_RESOLUTION]
        return [term for term, smallest in finding.limits.items() if not smallest <= RESOLUTION]

    def _look_closer(self, call: Call, expected: dict[str, Expected], found: dict[str, Finding]) -> None:
        """Judge what a lane cannot resolve in the next one; a term is resolved when it is in any lane.

        float32 copies for low-precision weights, float64 copies, and last float64 copies scaled down to the size of the
        update, where even an update of 1e-18 shows all its digits (but not its decay, which the others show).
        """

        def still_open() -> list[str]:
            return [n for n, f in found.items() if f.judged.met and self._unresolved(expected[n], f)]

        # Master copies are in float32 whatever the weights are: a float64 copy of the weights shows no more than they.
        lanes = ((Lane.FLOAT32, torch.float32), (Lane.FLOAT64, torch.float64))
        for lane, dtype in lanes[:1] if masters_of(self._phase.recipe.optimizer) else lanes:
            names = [
                n for n in still_open() if dtype is torch.float64 or real_dtype(call.before[n].dtype) in LOW_PRECISION
            ]
            if not names:
                continue
            try:
                updates = self._replays.updates(dtype)
            except Exception:  # a kernel for the native dtype only: that lane shows nothing, and its terms stay open
                continue
            references = self._references(dtype, expected, names)
            for name in names:
                self._merge(found, name, self._find(lane, dtype, updates[name], references[name]))
        if names := still_open():
            try:
                updates, references = self._replayed_small()
            except Exception:
                return
            for name in names:
                finding = self._find(Lane.FLOAT64, torch.float64, updates[name], references[name])
                finding.scaled = True
                self._merge(found, name, finding)

    def _references(
        self, dtype: torch.dtype, expected: dict[str, Expected], names: list[str]
    ) -> Mapping[str, Expected]:  # fmt: skip
        """Return the references of a lane: others than the native ones where a kernel's scalars are finer there."""
        assert self.rule is not None
        if not any(SCALARS in expected[name].options for name in names):
            return expected
        states: dict[str, State] = {}
        found: dict[str, Expected] = {}
        for call in self._replays.history:
            for name in names:
                reference = self._expect(self.rule, call, name, states, lane=dtype)
                if reference is not None:
                    found[name] = reference
        return found

    def _merge(self, found: dict[str, Finding], name: str, closer: Finding) -> None:
        before = found[name].limits
        for term, limit in before.items():
            closer.limits[term] = min(limit, closer.limits.get(term, limit))
        closer.limits = {t: limit for t, limit in closer.limits.items() if t in before}
        found[name] = closer

    def _replayed_small(self) -> tuple[dict[str, torch.Tensor], dict[str, Expected]]:
        """Return the last call's updates on scaled weights, and the references for those weights."""
        assert self.rule is not None
        replay = self._replays.fresh(torch.float64)
        sizes: dict[str, State] = {}
        states: dict[str, State] = {}
        updates: dict[str, torch.Tensor] = {}
        references: dict[str, Expected] = {}
        for call in self._replays.history:
            weights, references = dict(call.before), {}
            for name in self._replays.part:
                size = self._expect(self.rule, call, name, sizes, lane=torch.float64)
                if size is None:
                    continue
                scale = min(1.0, size.length / size.size) if size.size else 1.0
                if self.rule.noise is not None and size.terms.get("decay"):
                    # A coarse rule's decay shows where it is as large as the rest of the update.
                    scale = size.terms.get("gradient", 0.0) / size.terms["decay"]
                weights[name] = call.before[name].to(wide(call.before[name].dtype)) * scale
                reference = self._expect(self.rule, call, name, states, double(weights[name]), torch.float64)
                assert reference is not None
                references[name] = reference
            updates = replay.step(weights, call.gradients, call.options)
        return updates, references

    def _rule_row(self, call: Call, name: str, reference: Expected, finding: Finding, measured: float) -> ResultRow:
        assert self.rule is not None
        native = real_dtype(call.before[name].dtype)
        gradient = call.gradients[name]
        assert gradient is not None
        judged, limits = finding.judged, finding.limits
        length = reference.length
        count = math.sqrt(reference.theta.numel())
        numbers: dict[str, Any] = {
            "measured": measured * count,
            "expected": length * count,
            "error": judged.error,
            "threshold": judged.threshold,
            "detection_limit": max(limits.values()) if length and limits else None,
            "parameter_norm": reference.size * count,
            "gradient_norm": norm(gradient),
            "update_norm": length * count,
            "lane": finding.lane,
        }
        where = f"step {call.step}"
        if finding.lane is not Lane.NATIVE:
            where += f", {finding.lane} copy of the weights" + (
                " scaled to the update's size" if finding.scaled else ""
            )
        if not judged.met:
            message = (f"{name} did not move as {self.rule.title} says ({where}): the update's norm is "
                       f"{numbers['measured']:.3g}, the rule's {numbers['expected']:.3g}, error "
                       f"{judged.error:.3g} against {judged.threshold:.3g}")  # fmt: skip
            actual = double(call.moved(name)) - reference.theta
            if finding.lane is not Lane.NATIVE:
                dtype = torch.float32 if finding.lane is Lane.FLOAT32 else torch.float64
                actual, native = self._replays.updates(dtype).get(name, actual), dtype
                if not finding.scaled:
                    reference = finding.reference
            because = explain(self.rule, reference.theta, gradient, reference.before, reference.options, actual, native)
            if blamed := self._blamed(call, name):
                because = f"{blamed}; {because}" if because else blamed
            message = f"{message}; {because}" if because else message
            return self._row("update.rule", Outcome.FAIL, message + (DECLARE if self.rule.guessed else ""), call, name,
                             cause=because or None, **numbers)  # fmt: skip
        if not length and norm(gradient) and not reference.options.get("lr"):
            return self._row("update.rule", Outcome.INCONCLUSIVE, f"{name}: the learning rate is 0, no update to judge",
                             call, name, cause="lr is 0", **numbers)  # fmt: skip
        if unresolved := self._unresolved(reference, finding):
            message = (f"{name}: the {' and '.join(unresolved)} term of {self.rule.title} is too small to see "
                       f"({where}): an error of {max(limits[t] for t in unresolved):.2g} of it would pass")  # fmt: skip
            return self._row("update.rule", Outcome.INCONCLUSIVE, message, call, name, cause="unresolved", **numbers)
        moved = "stayed" if not length else "moved"
        message = f"{name} {moved} as {self.rule.title} says ({where})"
        return self._row("update.rule", Outcome.PASS, message, call, name, **numbers)

    def _blamed(self, call: Call, name: str) -> str:
        """What of the user's own ran around the rule and may have moved the parameter."""
        written = [w for w in call.writes if w.parameter == name and not declared_hook(w.hook, call.phase_expect)]
        if written:
            return "; ".join(f"{w.label} {w.text}" for w in written) + f"; {cure(written[0].hook)}"
        kept = self._phase.recipe.optimizer.kept
        step = None if kept is None or kept.mould is None else own_step(kept.mould)
        if step is not None:
            return f"its step was set on the instance: {callable_name(step)}"
        patched = patched_step(optimizer_class(self._phase.recipe.optimizer))
        return f"the step of its class was replaced: {patched}" if patched else ""

    def _without_gradient(self, call: Call, name: str) -> ResultRow:
        moved = name in call.after
        if moved:
            message = f"{name} received no gradient in step {call.step} and was moved all the same"
            return self._row("update.rule", Outcome.FAIL, message, call, name, lane=Lane.NATIVE, expected=0.0,
                             measured=norm(call.moved(name) - call.before[name]))  # fmt: skip
        if name not in self._subject.trainable or not call.before[name].numel():
            why = "frozen" if call.before[name].numel() else "empty"
            message = f"{name} is {why} and was left alone in step {call.step}: there is no update to judge"
            return self._row("update.rule", Outcome.SKIPPED, message, call, name, cause=why, lane=Lane.NATIVE)
        message = f"{name} received no gradient in step {call.step}: left alone, and its rule was not seen at work"
        return self._row(
            "update.rule", Outcome.INCONCLUSIVE, message, call, name, cause="no gradient", lane=Lane.NATIVE
        )

    def _without_rule(self, call: Call, name: str) -> ResultRow:
        """Judge a step of a class that no rule is known for: by the relations, and by what this step did."""
        if call.gradients.get(name) is None:
            return self._without_gradient(call, name)
        found = verdict_of(self._subject, self._phase)
        what = f"{name} {'moved' if name in call.after else 'stayed'} in step {call.step}"
        if found.unable:
            return self._row("update.rule", Outcome.INCONCLUSIVE, f"{what}: {found.unable}", call, name,
                             cause="no reference rule")  # fmt: skip
        message = f"{what}; its optimizer has no reference rule and is judged by relations"
        if not found.broken:
            return self._row("update.rule", Outcome.PASS, message, call, name, cause=RELATIONS, lane=Lane.SYNTHETIC)
        message += f", of which {len(found.broken)} do not hold: see optimizer.invariants"
        return self._row("update.rule", Outcome.WARN, message, call, name, cause=RELATIONS, lane=Lane.SYNTHETIC)

    def _state_rows(self, call: Call, name: str, reference: Expected) -> Iterator[ResultRow]:
        assert self.rule is not None
        if not self._subject.settings.wants_check("update.state"):
            return
        dtype = real_dtype(call.before[name].dtype)
        actual, wanted = call.state_after.get(name) or {}, self._state[name]
        actual = {key: actual.get(self._names.get(key, key) or key) for key in wanted}
        # What the rule never writes (a note of the optimizer's own, carried over from the capture) it does not know.
        shared = [k for k in wanted if actual[k] is not None and wanted[k] is not reference.before.get(k)]
        if not shared:
            return
        worst, at, met, threshold = -1.0, shared[0], True, 0.0
        for key in shared:
            error, limit = state_error(self.rule, key, actual[key], wanted[key], reference.before.get(key), dtype)
            if not error / limit <= worst:
                worst, at, threshold, met = error / limit, key, limit, error <= limit
        message = f"{name}: the optimizer's {at} after step {call.step} "
        message += "is the rule's" if met else f"is not the rule's (error {worst * threshold:.3g})"
        hooks = [w for w in call.writes if (w.what, w.parameter) == ("state", name)]
        if hooks and not met:
            message += "; before it " + "; ".join(f"{w.label} {w.text}" for w in hooks) + f"; {cure(hooks[0].hook)}"
        yield self._row("update.state", Outcome.PASS if met else Outcome.FAIL, message, call, name,
                        error=worst * threshold, threshold=threshold)  # fmt: skip

    def _rounding_row(self, call: Call, name: str, reference: Expected) -> ResultRow:
        share = lost_share(call, name, reference.update, self._moved)
        lost = share > LOST_SHARE
        dtype = call.before[name].dtype
        message = f"{name}: {share:.0%} of the norm of step {call.step}'s update was lost"
        if lost:
            message += f": most of it is below the spacing of {dtype}"
            message += (
                "; keep float32 master weights, or round stochastically" if dtype in LOW_PRECISION
                else "; the learning rate is too small for these weights"
            )  # fmt: skip
        return self._row("update.lost-to-rounding", Outcome.WARN if lost else Outcome.PASS, message, call, name,
                         error=share, threshold=LOST_SHARE)  # fmt: skip

    def _row(self, check: str, outcome: Outcome, message: str, call: Call, name: str, **fields: Any) -> ResultRow:
        return row(
            self._subject, check, outcome, message, phase=self._phase.name, step=call.step, parameter=name, **fields
        )
