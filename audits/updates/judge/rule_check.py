"""Every recorded optimizer step against the reference rule: `update.rule`, `.state`, `.lost-to-rounding`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import torch

from audits.causes import Cause
from audits.live.subject import LivePhase, Subject
from audits.outcomes import Lane, Outcome, ResultRow
from audits.recipe.constructing import optimizer_class
from audits.recipe.moulds import callable_name, declared_hook, own_step, patched_step
from audits.updates.compare import (
    real_dtype,
    rms,
)
from audits.updates.compare import to_double as double
from audits.updates.judge.apply_rule import reference_state, rule_for
from audits.updates.judge.closer import CloserLook, Finding
from audits.updates.judge.coarse_rows import coarse_step_rows
from audits.updates.judge.coarse_state import coarse_state
from audits.updates.judge.expected import Expected, expect, state_error
from audits.updates.judge.lost_to_rounding import lost_share, share_of, whole_step
from audits.updates.judge.masters import masters_of, seen_by_masters
from audits.updates.judge.other_rules import explain
from audits.updates.judge.own_attributes import shared_state
from audits.updates.judge.replay import LaneCache, parts_of
from audits.updates.judge.sliced_look import SlicedFinding, SlicedLook
from audits.updates.judge.slices import slice_size, sliced_state
from audits.updates.judge.state_names import IN_GROUP, state_names
from audits.updates.judge.step_rows import rounding_row, without_gradient_row, without_rule_row
from audits.updates.judge.whose_step import torch_owned
from audits.updates.record.calls import Call
from audits.updates.record.hook_listener import cure
from audits.updates.rules import State
from audits.updates.rules.base import DECLARE
from audits.updates.update_rows import norm, row


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
        self._begin()

    def _begin(self) -> None:
        """Begin the replays from what is captured."""
        self._lanes = LaneCache(self._phase.recipe.optimizer, self._captured)
        self._part: tuple[str, ...] = ()
        if self.rule is not None:
            self._closer_look = CloserLook(self.rule, self._phase, self._lanes, self._expect)
            self._sliced = SlicedLook(self.rule, self._phase, self._closer_look, self._expect, self._began)

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
                yield without_rule_row(self._subject, call, parameter)
            return
        if self._coarse is not None:
            yield from coarse_step_rows(self._subject, self._phase, self.rule, self._coarse, call, wanted)
            yield from (without_gradient_row(self._subject, call, n) for n in wanted if call.gradients.get(n) is None)
            return
        if call.state_before is not None:  # a declared hook wrote there: the rule goes on from what it wrote
            self._state, self._captured = {}, call.state_before
            self._begin()
        if nameless := self._nameless:
            keys = " and ".join(nameless)
            for parameter in wanted:
                message = (f"{parameter}: the captured state holds {keys} of {self.rule.title} under no name that is "
                           "known: judged from fresh state alone, in this step and by optimizer.probe")  # fmt: skip
                yield self._row(
                    "update.rule", Outcome.INCONCLUSIVE, message, call, parameter, cause=Cause.OTHER_STATE_NAMES
                )
            return
        if masters := masters_of(self._phase.recipe.optimizer):
            held = self._masters if self._with_state else {}
            call, self._masters, left = seen_by_masters(call, masters, held)
            for parameter in left:
                message = f"{parameter} is not the rounding of its master copy in the optimizer's state"
                yield self._row("update.rule", Outcome.FAIL, message, call, parameter, lane=Lane.NATIVE)
        self._lanes.history.append(call)
        self._moved = whole_step(call)
        size = slice_size(self._subject.device) if torch_owned(self._phase) else None
        sizes = {name: self._subject.parameters[name].numel() for name in wanted}
        for part in parts_of(wanted, sizes, size):
            if len(part) == 1 and self._sliced.wants(call, part[0]):
                found = self._sliced.at(part[0])
                if found is not None:
                    yield from self._rows_of_slices(call, part[0], found)
                    continue
            self._turn_to(part)
            yield from self._rows_of(call, part)

    def _turn_to(self, part: tuple[str, ...]) -> None:
        """Go on with these parameters: their reference state is worked out again, that of others is let go."""
        self._lanes.turn_to(part)
        if self._part == part:
            return
        self._part, self._state = part, {}
        for earlier in self._lanes.history[:-1]:
            for name in part:
                self._expect(earlier, name, self._state)

    def _rows_of_slices(self, call: Call, name: str, found: SlicedFinding) -> Iterator[ResultRow]:
        yield self._rule_row(call, name, found.expected, found.finding, found.measured)
        if found.states and self._subject.settings.wants_check("update.state"):
            yield self._state_row(call, name, found.states)
        count = self._subject.parameters[name].numel()
        yield rounding_row(self._subject, call, name,
                           share_of(found.lost, found.expected.length * math.sqrt(count), self._moved))  # fmt: skip

    def _rows_of(self, call: Call, wanted: tuple[str, ...]) -> Iterator[ResultRow]:
        assert self.rule is not None
        expected = {n: e for n in wanted if (e := self._expect(call, n, self._state)) is not None}
        found: dict[str, Finding] = {}
        lengths: dict[str, float] = {}
        for name, reference in expected.items():
            actual = double(call.moved(name)).sub_(reference.theta)
            lengths[name] = rms(actual)
            found[name] = self._closer_look.find(Lane.NATIVE, real_dtype(call.before[name].dtype), actual, reference)
        self._closer_look.look_closer(call, expected, found)
        for name in wanted:
            if name not in expected:
                yield without_gradient_row(self._subject, call, name)
                continue
            yield self._rule_row(call, name, expected[name], found[name], lengths[name])
            yield from self._state_rows(call, name, expected[name])
            yield rounding_row(self._subject, call, name, lost_share(call, name, expected[name].update, self._moved))

    def _expect(
        self,
        call: Call,
        name: str,
        states: dict[str, State],
        theta: torch.Tensor | None = None,
        lane: torch.dtype | None = None,
    ) -> Expected | None:
        if name not in states:
            states[name] = self._began(call, name)
        assert self.rule is not None
        return expect(self.rule, self._phase, call, name, states[name], theta, lane)

    def _began(self, call: Call, name: str, part: slice | None = None) -> State:
        """Return the reference state that a parameter, or a part of its elements, begins from."""
        held, parameter = {**self._shared, **self._captured.get(name, {})}, self._subject.parameters[name]
        if part is not None:
            held = sliced_state(held, parameter.numel(), part)
        state = reference_state(held, parameter.device, self._names)
        if self._names.get("step") == IN_GROUP:  # a rule of torch's would count from the state alone
            options = call.options[name]
            state["step"] = float(options.get("step", options.get("k", 0.0)))
        return state

    def _rule_row(self, call: Call, name: str, reference: Expected, finding: Finding, measured: float) -> ResultRow:
        assert self.rule is not None
        native = real_dtype(call.before[name].dtype)
        gradient = call.gradients[name]
        assert gradient is not None
        judged, limits = finding.judged, finding.limits
        length = reference.length
        count = math.sqrt(reference.elements or reference.theta.numel())
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
                actual, native = self._lanes.updates(dtype).get(name, actual), dtype
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
                             call, name, cause=Cause.RATE_IS_ZERO, **numbers)  # fmt: skip
        if unresolved := self._closer_look.unresolved(reference, finding):
            message = (f"{name}: the {' and '.join(unresolved)} term of {self.rule.title} is too small to see "
                       f"({where}): an error of {max(limits[t] for t in unresolved):.2g} of it would pass")  # fmt: skip
            return self._row(
                "update.rule", Outcome.INCONCLUSIVE, message, call, name, cause=Cause.UNRESOLVED, **numbers
            )
        moved = "stayed" if not length else "moved"
        message = f"{name} {moved} as {self.rule.title} says ({where})"
        assumed = self._phase.assumed_rates.get(name)
        if assumed is not None and assumed.replaced_by(call.options[name].get("lr")):
            assumed = None
        if assumed is not None:
            message += f"; its learning rate is 0, and {assumed.rate:g} was assumed, {assumed.text}"
        cause = Cause.ASSUMED if assumed is not None else None
        return self._row("update.rule", Outcome.PASS, message, call, name, cause=cause, **numbers)

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
        yield self._state_row(
            call,
            name,
            [
                (key, *state_error(self.rule, key, actual[key], wanted[key], reference.before.get(key), dtype))
                for key in shared
            ],
        )

    def _state_row(self, call: Call, name: str, found: list[tuple[str, float, float]]) -> ResultRow:
        """Return the row of the entry of the state that is worst off; each is (name, error, threshold)."""
        assert self.rule is not None
        worst, at, met, threshold = -1.0, found[0][0], True, 0.0
        for key, error, limit in found:
            if not error / limit <= worst:
                worst, at, threshold, met = error / limit, key, limit, error <= limit
        message = f"{name}: the optimizer's {at} after step {call.step} "
        message += "is the rule's" if met else f"is not the rule's (error {worst * threshold:.3g})"
        hooks = [w for w in call.writes if (w.what, w.parameter) == ("state", name)]
        if hooks and not met:
            message += "; before it " + "; ".join(f"{w.label} {w.text}" for w in hooks) + f"; {cure(hooks[0].hook)}"
        return self._row("update.state", Outcome.PASS if met else Outcome.FAIL, message, call, name,
                         error=worst * threshold, threshold=threshold)  # fmt: skip

    def _row(self, check: str, outcome: Outcome, message: str, call: Call, name: str, **fields: Any) -> ResultRow:
        return row(
            self._subject, check, outcome, message, phase=self._phase.name, step=call.step, parameter=name, **fields
        )
