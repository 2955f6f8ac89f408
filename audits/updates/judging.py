"""Every recorded optimizer step against the reference rule: `update.rule`, `update.state`, `update.lost-to-rounding`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from audits.outcomes import Lane, Outcome, ResultRow
from audits.subject import LivePhase, Subject
from audits.updates.apply import COUNTERS, copy_state, reference_state, reference_update, rule_for, rule_options
from audits.updates.compare import RESOLUTION, Judged, deviation, judge, real_dtype, relative_tolerance, resolution, rms
from audits.updates.compare import to_double as double
from audits.updates.diagnose import explain
from audits.updates.recorder import Call
from audits.updates.replay import Replay
from audits.updates.rows import norm, row
from audits.updates.rules import Rule, State

#: Share of vanished updates above which `update.lost-to-rounding` warns.
LOST_SHARE = 0.5

_LANES = {torch.float64: Lane.FLOAT64, torch.float32: Lane.FLOAT32}
_LOW = (torch.bfloat16, torch.float16)


@dataclass
class Expected:
    """The reference update of one parameter in one call, with the size of each term in it."""

    theta: torch.Tensor
    update: torch.Tensor
    terms: dict[str, float]
    before: State
    options: Mapping[str, Any]


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
        self._captured = phase.recipe.optimizer.state if with_state else {}
        self._state: dict[str, State] = {}
        self._replays: dict[torch.dtype, Replay] = {}
        #: Deviation of failing rows, for whoever looks for the cause.
        self.failed: list[str] = []

    def rows(self, call: Call) -> Iterator[ResultRow]:
        """Yield the rows of one call."""
        wanted = [n for n in dict.fromkeys(call.options) if self._subject.settings.wants_parameter(n)]
        if self.rule is None:
            name = self._phase.recipe.optimizer.class_path
            for parameter in wanted:
                message = f"there is no reference rule for {name}: see optimizer.invariants"
                yield self._row(
                    "update.rule", Outcome.INCONCLUSIVE, message, call, parameter, cause="no reference rule"
                )
            return
        expected = {name: self._expect(self.rule, call, name) for name in wanted}
        judged: dict[str, tuple[torch.dtype, Judged, dict[str, float]]] = {}
        for name, reference in expected.items():
            if reference is not None:
                dtype = real_dtype(call.before[name].dtype)
                actual = double(call.moved(name)) - reference.theta
                judged[name] = self._judge(dtype, actual, reference)
        open_names = [n for n, (d, j, r) in judged.items() if j.met and not self._resolved(d, expected[n], r)]
        self._resolve_in_other_lanes(call, open_names, expected, judged)
        for name, reference in expected.items():
            if reference is None:
                yield self._without_gradient(call, name)
                continue
            yield self._rule_row(call, name, reference, *judged[name])
            yield from self._state_rows(call, name, reference)
            yield self._rounding_row(call, name, reference)

    def _expect(self, rule: Rule, call: Call, name: str) -> Expected | None:
        gradient = call.gradients.get(name)
        if gradient is None:
            return None
        state = self._state.setdefault(name, reference_state(self._captured.get(name)))
        theta = double(call.before[name])
        options = rule_options(self._phase, call.options[name], real_dtype(call.before[name].dtype))
        before = copy_state(state)
        update = reference_update(rule, theta, gradient, state, options)
        return Expected(theta, update, self._terms(rule, theta, gradient, before, options, update), before, options)

    def _terms(
        self, rule: Rule, theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Mapping[str, Any],
        update: torch.Tensor,
    ) -> dict[str, float]:  # fmt: skip
        """Return the rms of what each term adds to the update: what changes when the term is taken out."""
        terms = {"gradient": rms(update)}
        if options.get("weight_decay"):
            bare = reference_update(rule, theta, gradient, copy_state(state), {**options, "weight_decay": 0.0})
            terms["decay"] = rms(update - bare)
            terms["gradient"] = rms(bare)
        if state.get("step", state.get("momentum_buffer")) is not None and _remembers(options, rule):
            bare = reference_update(rule, theta, gradient, copy_state(state), {**options, **rule.momentum})
            terms["momentum"] = rms(update - bare)
        return terms

    def _judge(
        self, dtype: torch.dtype, actual: torch.Tensor, reference: Expected
    ) -> tuple[torch.dtype, Judged, dict[str, float]]:
        assert self.rule is not None
        found = judge(deviation(actual, reference.update, reference.theta, dtype), self.rule, dtype, reference.options)
        theta, full = rms(reference.theta), rms(reference.update)
        limits = {
            term: resolution(self.rule, dtype, reference.options, theta, full, size)
            for term, size in reference.terms.items()
            if size or term == "gradient"
        }
        return dtype, found, limits

    def _resolved(self, dtype: torch.dtype, reference: Expected | None, limits: Mapping[str, float]) -> bool:
        """Whether every term of the rule would have shown a hundredth of itself."""
        assert self.rule is not None
        assert reference is not None
        if not rms(reference.update):  # the rule says: stay; that is exact in every lane
            return True
        tolerance = relative_tolerance(self.rule, dtype, reference.options)
        coarse = tolerance if tolerance is not None and tolerance > RESOLUTION else RESOLUTION
        return all(limit <= coarse for limit in limits.values())

    def _resolve_in_other_lanes(
        self, call: Call, names: list[str], expected: dict[str, Expected | None],
        judged: dict[str, tuple[torch.dtype, Judged, dict[str, float]]],
    ) -> None:  # fmt: skip
        """Judge what the native dtype cannot resolve on float32 and float64 copies, in place in ``judged``."""
        assert self.rule is not None
        for lane in (torch.float32, torch.float64):
            candidates = [n for n in names if lane is torch.float64 or judged[n][0] in _LOW]
            # Every held parameter is replayed in every step, so that the lane's own state runs on.
            if not any(real_dtype(call.before[n].dtype) in _LOW or lane is torch.float64 for n in call.options):
                continue
            if not candidates and lane not in self._replays and call.step > 1:
                continue
            replay = self._replays.get(lane)
            if replay is None:
                held = {n: call.before[n] for n in dict.fromkeys(self._phase.recipe.optimizer.names)}
                replay = self._replays[lane] = Replay(self._phase.recipe.optimizer, held, lane, self._captured)
            updates = replay.step(call.before, call.gradients, call.options)
            for name in candidates:
                reference = expected[name]
                assert reference is not None
                # The lane's weights carry less rounding than the native ones, whose reference this is.
                in_lane = self._judge(lane, updates[name], reference)
                judged[name] = in_lane
            names = [
                n for n in names if judged[n][1].met and not self._resolved(judged[n][0], expected[n], judged[n][2])
            ]

    def _rule_row(
        self, call: Call, name: str, reference: Expected, dtype: torch.dtype, found: Judged, limits: dict[str, float]
    ) -> ResultRow:
        assert self.rule is not None
        native = real_dtype(call.before[name].dtype)
        lane = Lane.NATIVE if dtype is native else _LANES[dtype]
        gradient = call.gradients[name]
        assert gradient is not None
        length = rms(reference.update)
        numbers: dict[str, Any] = {
            "measured": norm(call.moved(name).to(torch.complex128 if call.moved(name).is_complex() else torch.float64)
                             - call.before[name]),
            "expected": norm(reference.update),
            "error": found.error,
            "threshold": found.threshold,
            "detection_limit": max(limits.values()) if length else None,
            "parameter_norm": norm(call.before[name]),
            "gradient_norm": norm(gradient),
            "update_norm": norm(reference.update),
            "lane": lane,
        }  # fmt: skip
        where = f"step {call.step}" + ("" if lane is Lane.NATIVE else f", {lane} copy of the weights")
        if not found.met:
            self.failed.append(name)
            actual = double(call.moved(name)) - reference.theta
            message = (f"{name} did not move as {self.rule.name}'s rule says ({where}): the update's norm is "
                       f"{numbers['measured']:.3g}, the rule's {numbers['expected']:.3g}, error "
                       f"{found.error:.3g} against {found.threshold:.3g}")  # fmt: skip
            because = explain(self.rule, reference.theta, gradient, reference.before, reference.options, actual, native)
            return self._row("update.rule", Outcome.FAIL, f"{message}; {because}" if because else message, call, name,
                             cause=because or None, **numbers)  # fmt: skip
        if not length and rms(double(gradient.to_dense())) and not reference.options.get("lr"):
            return self._row("update.rule", Outcome.INCONCLUSIVE, f"{name}: the learning rate is 0, no update to judge",
                             call, name, cause="lr is 0", **numbers)  # fmt: skip
        unresolved = (
            [] if self._resolved(dtype, reference, limits) else [t for t, r in limits.items() if r > RESOLUTION]
        )
        if unresolved:
            message = (f"{name}: the {' and '.join(unresolved)} term of {self.rule.name}'s rule is too small to be seen "
                       f"({where}): an error of {max(limits[t] for t in unresolved):.2g} of it would pass")  # fmt: skip
            return self._row("update.rule", Outcome.INCONCLUSIVE, message, call, name, cause="unresolved", **numbers)
        moved = "stayed" if not length else "moved"
        message = f"{name} {moved} as {self.rule.name}'s rule says ({where})"
        return self._row("update.rule", Outcome.PASS, message, call, name, **numbers)

    def _without_gradient(self, call: Call, name: str) -> ResultRow:
        moved = name in call.after
        if moved:
            self.failed.append(name)
            message = f"{name} received no gradient in step {call.step} and was moved all the same"
            return self._row("update.rule", Outcome.FAIL, message, call, name, lane=Lane.NATIVE, expected=0.0,
                             measured=norm(call.moved(name) - call.before[name]))  # fmt: skip
        message = f"{name} received no gradient in step {call.step}: left alone, and its rule was not seen at work"
        return self._row(
            "update.rule", Outcome.INCONCLUSIVE, message, call, name, cause="no gradient", lane=Lane.NATIVE
        )

    def _state_rows(self, call: Call, name: str, reference: Expected) -> Iterator[ResultRow]:
        assert self.rule is not None
        if not self._subject.settings.wants_check("update.state"):
            return
        dtype = real_dtype(call.before[name].dtype)
        actual, wanted = reference_state(call.state_after.get(name)), self._state[name]
        shared = [key for key in wanted if key in actual]
        if not shared:
            return
        worst, at, met, threshold = -1.0, shared[0], True, 0.0
        for key in shared:
            error, limit = _state_error(self.rule, key, actual[key], wanted[key], reference.before.get(key), dtype,
                                        call.state_after[name][key])  # fmt: skip
            if error / limit > worst:
                worst, at, threshold, met = error / limit, key, limit, error <= limit
        message = f"{name}: the optimizer's {at} after step {call.step} "
        message += "is the rule's" if met else f"is not the rule's (error {worst * threshold:.3g})"
        yield self._row("update.state", Outcome.PASS if met else Outcome.FAIL, message, call, name,
                        error=worst * threshold, threshold=threshold)  # fmt: skip

    def _rounding_row(self, call: Call, name: str, reference: Expected) -> ResultRow:
        meant = reference.update != 0
        moved = (double(call.moved(name)) - reference.theta) != 0
        count = int(meant.sum())
        share = int((meant & ~moved).sum()) / count if count else 0.0
        lost = share > LOST_SHARE
        message = f"{name}: {share:.0%} of the elements that step {call.step} should move did not"
        message += f": the updates are below the spacing of {call.before[name].dtype}" if lost else ""
        return self._row("update.lost-to-rounding", Outcome.WARN if lost else Outcome.PASS, message, call, name,
                         error=share, threshold=LOST_SHARE)  # fmt: skip

    def _row(self, check: str, outcome: Outcome, message: str, call: Call, name: str, **fields: Any) -> ResultRow:
        return row(
            self._subject, check, outcome, message, phase=self._phase.name, step=call.step, parameter=name, **fields
        )


def _remembers(options: Mapping[str, Any], rule: Rule) -> bool:
    return bool(rule.momentum) and any(options.get(key) not in (None, value) for key, value in rule.momentum.items())


def _state_error(
    rule: Rule, key: str, actual: Any, wanted: Any, before: Any, dtype: torch.dtype, stored: Any
) -> tuple[float, float]:
    """Return (error, threshold) of one entry of the state."""
    if key in COUNTERS:
        # torch keeps its scalars in float32.
        close = abs(float(actual) - float(wanted)) <= 1e-6 * abs(float(wanted))
        return (0.0 if close else float("inf"), 1.0)
    if not isinstance(wanted, torch.Tensor) or not isinstance(actual, torch.Tensor):
        return (0.0 if actual == wanted else float("inf"), 1.0)
    if actual.shape != wanted.shape:
        return float("inf"), 1.0
    kept_in = real_dtype(stored.dtype) if isinstance(stored, torch.Tensor) else dtype
    eps = max(torch.finfo(kept_in).eps, torch.finfo(dtype).eps) if kept_in.is_floating_point else torch.finfo(dtype).eps
    scale = rms(wanted) + (rms(before) if isinstance(before, torch.Tensor) else 0.0)
    off = rms(actual - wanted)
    limit = 3.0 if kept_in in _LOW else 4.0
    tolerance = (rule.relative or {}).get(dtype)
    if tolerance is not None and scale and off <= tolerance * scale:
        return 0.0, limit
    return (off / (eps * scale) if scale else (float("inf") if off else 0.0)), limit
