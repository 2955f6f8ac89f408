"""A large tensor's update and state judged slice by slice, in every lane that is needed (`slices`)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from audits.live.subject import LivePhase
from audits.outcomes import Lane
from audits.updates.compare import SLACK, judge
from audits.updates.compare import to_double as double
from audits.updates.judge.closer import CloserLook, Expect, Finding
from audits.updates.judge.expected import LOW_PRECISION, SAMPLE, Expected, state_distance, state_error
from audits.updates.judge.lost_to_rounding import stayed_in
from audits.updates.judge.masters import masters_of
from audits.updates.judge.replay import LaneCache, restricted
from audits.updates.judge.slices import (
    StateSums,
    Sums,
    can_slice,
    over_slices,
    slice_size,
    sliced_call,
    sliced_state,
)
from audits.updates.judge.whose_step import torch_owned
from audits.updates.record.calls import Call
from audits.updates.rules import Rule, State
from audits.updates.rules.base import SCALARS

#: ``(call, parameter, elements of it or None for all) -> state``: the reference state that a run begins from.
Began = Callable[[Call, str, slice | None], State]


@dataclass(frozen=True)
class SlicedFinding:
    """What the slices of a parameter told; everything is as the rule says, but for its state perhaps.

    Attributes:
        finding: how the update was judged.
        expected: sizes and terms of the rule's update; its vectors are a sample.
        measured: rms of the update that was made.
        lost: norm of the rule's update of the elements that stayed.
        states: of each entry of the state (name, error, threshold).
    """

    finding: Finding
    expected: Expected
    measured: float
    lost: float
    states: list[tuple[str, float, float]]


class SlicedLook:
    """Judges large tensors of a phase whose optimizer treats each element by itself.

    Args:
        rule: its rule.
        phase: whose optimizer.
        look: judges what is worked out here.
        expect: what the rule expects.
        began: the state that the rule begins from.
    """

    def __init__(self, rule: Rule, phase: LivePhase, look: CloserLook, expect: Expect, began: Began) -> None:
        self._rule, self._phase, self._look, self._expect, self._began = rule, phase, look, expect, began
        plain = rule.elementwise and not rule.sparse and rule.noise is None and rule.inside is None
        self._possible = plain and torch_owned(phase) and not masters_of(phase.recipe.optimizer)

    def wants(self, call: Call, name: str) -> bool:
        """Whether a parameter is too large to be judged whole, and can be judged in slices."""
        parameter = self._phase.parameters.get(name)
        return (
            self._possible
            and parameter is not None
            and parameter.numel() > slice_size(parameter.device)
            and can_slice([call], name)
        )

    def at(self, name: str) -> SlicedFinding | None:
        """Judge the last call of one parameter; None where only the vectors whole would tell."""
        calls, look = self._look.lanes.history, self._look
        if not can_slice(calls, name):
            return None
        parameter = self._phase.parameters[name]
        count, native = parameter.numel(), parameter.dtype
        sums, states, lost = self._native(calls, name)
        thin = self._thin(calls, name, count, sums)
        if thin is None or (deviation := sums.deviation(native)) is None:
            return None
        judged = judge(deviation, self._rule, native, thin.options)
        finding = look.limited(Lane.NATIVE, native, judged, thin, sums.size)
        lanes = ((Lane.FLOAT32, torch.float32), (Lane.FLOAT64, torch.float64))
        for lane, dtype in lanes if native in LOW_PRECISION else lanes[1:]:
            if not finding.judged.met:
                return None
            if look.unresolved(thin, finding):
                closer = self._closer(calls, name, lane, dtype, thin)
                if closer is None:
                    return None
                finding = closer.after(finding.limits)
        if not finding.judged.met or look.unresolved(thin, finding):
            return None
        measured = math.sqrt(sums.actual / count)
        return SlicedFinding(finding, thin, measured, lost, self._states_of(states, native, count))

    def _native(self, calls: list[Call], name: str) -> tuple[Sums, dict[str, StateSums], float]:
        """Add up the update that was made, the state it left, and what was lost to rounding."""
        sums, states, lost = Sums(), dict[str, StateSums](), [0.0]

        def each(sliced: list[Call], part: slice) -> None:
            running = {name: self._began(calls[0], name, part)}
            reference = self._last(sliced, name, running)
            call = sliced[-1]
            lost.append(float(torch.linalg.vector_norm(stayed_in(call, name, reference.update))))
            for key, actual, wanted in self._entries(call, name, running[name], reference):
                states.setdefault(key, StateSums()).add(actual, wanted, reference.before.get(key))
            sums.add(reference.theta, double(call.moved(name)).sub_(reference.theta), reference.update)

        over_slices(calls, name, each)
        return sums, states, math.hypot(*lost)

    def _last(
        self, calls: list[Call], name: str, states: dict[str, State], lane: torch.dtype | None = None
    ) -> Expected:  # fmt: skip
        reference: Expected | None = None
        for call in calls:
            reference = self._expect(call, name, states, lane=lane)
        assert reference is not None
        return reference

    def _entries(self, call: Call, name: str, wanted: State, reference: Expected) -> list[tuple[str, object, object]]:
        actual = call.state_after.get(name) or {}
        return [  # torch's own optimizers, whose names of the state are the rule's
            (key, actual[key], value)
            for key, value in wanted.items()
            if actual.get(key) is not None and value is not reference.before.get(key)
        ]

    def _thin(self, calls: list[Call], name: str, count: int, sums: Sums) -> Expected | None:
        """Return what the rule expects of every k-th element, with the sizes of the whole."""
        part = slice(None, None, max(1, count // SAMPLE))
        states = {name: self._began(calls[0], name, part)}
        expected = self._last([sliced_call(call, name, part) for call in calls], name, states)
        return dataclasses.replace(expected, size=sums.size, length=sums.length, elements=count)

    def _closer(
        self, calls: list[Call], name: str, lane: Lane, dtype: torch.dtype, thin: Expected
    ) -> Finding | None:  # fmt: skip
        """Judge the update that the build makes of copies in another dtype; None where that asks for the vectors."""
        if lane is Lane.FLOAT64 and thin.options.get(SLACK):
            return None
        other = dtype if SCALARS in thin.options else None
        held = self._look.lanes.captured.get(name)
        count, recipe = self._phase.parameters[name].numel(), restricted(self._phase.recipe.optimizer, (name,))
        sums = Sums()

        def each(sliced: list[Call], part: slice) -> None:
            lanes = LaneCache(recipe, {} if held is None else {name: sliced_state(held, count, part)})
            lanes.history = sliced
            lanes.turn_to((name,))
            made = lanes.updates(dtype)[name]
            del lanes
            reference = self._last(sliced, name, {name: self._began(calls[0], name, part)}, other)
            sums.add(reference.theta, made, reference.update)

        try:
            over_slices(calls, name, each)
        except Exception:  # a kernel for the native dtype only: judged whole, the lane says so
            return None
        if (deviation := sums.deviation(dtype)) is None:
            return None
        reference = dataclasses.replace(thin, size=sums.size, length=sums.length)
        judged = judge(deviation, self._rule, dtype, reference.options)
        return self._look.limited(lane, dtype, judged, reference, sums.size)

    def _states_of(
        self, states: dict[str, StateSums], dtype: torch.dtype, count: int
    ) -> list[tuple[str, float, float]]:  # fmt: skip
        found = []
        for key, of in states.items():
            if of.kept_in is None:
                actual, wanted, before = of.first
                error, limit = state_error(self._rule, key, actual, wanted, before, dtype)
            else:
                scale = math.sqrt(of.wanted / count) + math.sqrt(of.before / count)
                error, limit = state_distance(self._rule, math.sqrt(of.off / count), scale, of.kept_in, dtype)
            found.append((key, error, limit))
        return found
