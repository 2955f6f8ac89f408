"""The two real steps once more from fresh optimizer state: the recorded gradients, no forward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from audits.live.subject import LivePhase, Subject
from audits.outcomes import Outcome, ResultRow
from audits.structures import map_tensors
from audits.updates.judge.replay import Replay
from audits.updates.judge.rule_check import RuleJudge
from audits.updates.record.calls import Call


class FreshState:
    """Replays a phase whose recipe brought optimizer state, without it; only what fails there is told."""

    def __init__(self, subject: Subject, phase: LivePhase) -> None:
        self._phase = phase
        self._judge = RuleJudge(subject, phase, with_state=False)
        self._replay: Replay | None = None

    def rows(self, call: Call) -> Iterator[ResultRow]:
        """Yield the failing rows of one call's gradients from fresh state."""
        if self._judge.rule is None:
            return
        recipe = self._phase.recipe.optimizer
        if self._replay is None:
            held = {n: call.before[n] for n in dict.fromkeys(recipe.names)}
            self._replay = Replay(recipe, held, None, {})
        try:
            self._replay.step(call.before, call.gradients, call.options)
        except Exception:  # an optimizer that cannot step outside of its training script
            return
        optimizer, copies = self._replay.optimizer, self._replay.copies
        replayed = dataclasses.replace(
            call,
            state_before=None,
            after={n: copy.detach().clone() for n, copy in copies.items()},
            state_after={
                n: map_tensors(dict(optimizer.state[copy]), lambda t: t.detach().clone())
                for n, copy in copies.items()
                if optimizer.state.get(copy)
            },
        )
        for r in self._judge.rows(replayed):
            if r.outcome is Outcome.FAIL and call.gradients.get(r.parameter or "") is not None:
                yield dataclasses.replace(r, message=f"from fresh optimizer state: {r.message}")
