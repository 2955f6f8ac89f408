"""Learning rates at which a rule can be judged: a rate of 0 moves nothing, so another one is assumed, and said.

Knows recipes; the model's parameters by name alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from audits.checks.step import RATE_TENSOR
from audits.recipe.phases import ParameterGroup, PhaseRecipe

#: The rate of a group that never had another than 0: the default of torch's adaptive optimizers.
LAST_RESORT = 1e-3


@dataclass(frozen=True)
class AssumedRate:
    """A group's rate that was put in the place of 0.

    Attributes:
        rate: the rate.
        text: where it comes from, for a sentence.
        never: whether the group's rate is 0 in all that is known of its training.
    """

    rate: float
    text: str
    never: bool = False

    def replaced_by(self, used: object) -> bool:
        """Whether a step took another rate than the assumed one: it sets the rate itself."""
        return isinstance(used, (int, float)) and not math.isclose(used, self.rate, rel_tol=RATE_TENSOR.value)


def audited_at(phase: PhaseRecipe) -> tuple[PhaseRecipe, dict[int, AssumedRate], bool]:
    """Return a phase with rates above 0, what was assumed by group, and whether its schedule has ended at 0.

    A schedule that begins at 0 is entered at its first step with a rate above 0. A group that is at 0 there, or has no
    schedule, gets its own first rate above 0, else its ``initial_lr``, else the constructor's, else `LAST_RESORT`.

    Args:
        phase: as captured.
    """
    groups, schedule = phase.optimizer.groups, phase.scheduler
    rates = _entered(schedule.learning_rates) if schedule is not None else ()
    if schedule is not None and len(rates[0] if rates else ()) != len(groups):
        rates = ()
    ended = bool(rates) and not any(rate > 0 for step in rates for rate in step)
    assumed: dict[int, AssumedRate] = {}
    for index, group in enumerate(groups):
        own = [step[index] for step in rates]
        now = own[0] if own else group.options.get("lr")
        if isinstance(now, (int, float)) and now == 0 and group.parameters:
            assumed[index] = _assumed(phase, group, own, ended=ended)
    if not assumed and not rates:
        return phase, {}, False
    chosen = tuple(_at_rate(group, assumed.get(i), rates[0][i] if rates else None) for i, group in enumerate(groups))
    optimizer = dataclasses.replace(phase.optimizer, groups=chosen)
    if schedule is not None and rates:
        played = tuple(
            tuple(rate if rate > 0 or i not in assumed else assumed[i].rate for i, rate in enumerate(step))
            for step in rates
        )
        schedule = dataclasses.replace(schedule, learning_rates=played)
    return dataclasses.replace(phase, optimizer=optimizer, scheduler=schedule), assumed, ended


def _entered(rates: Sequence[tuple[float, ...]]) -> tuple[tuple[float, ...], ...]:
    """Return the schedule from its first step with a rate above 0; all of it where there is none."""
    first = next((k for k, step in enumerate(rates) if any(rate > 0 for rate in step)), 0)
    return tuple(rates[first:])


def _assumed(phase: PhaseRecipe, group: ParameterGroup, own: Sequence[float], *, ended: bool) -> AssumedRate:
    later = next((rate for rate in own if rate > 0), None)
    if later is not None:
        return AssumedRate(later, "the schedule's first above 0 for its group")
    started = _positive(group.options.get("initial_lr"))
    if started is not None:
        return AssumedRate(started, "its group's initial_lr", never=bool(own) and not ended)
    given = _positive(phase.optimizer.defaults.get("lr"))
    if given is not None:
        return AssumedRate(given, "the optimizer's default", never=not ended)
    return AssumedRate(LAST_RESORT, "a usual one", never=True)


def _positive(rate: object) -> float | None:
    return float(rate) if isinstance(rate, (int, float)) and rate > 0 else None


def _at_rate(group: ParameterGroup, assumed: AssumedRate | None, scheduled: float | None) -> ParameterGroup:
    """Return the group with the rate that its first audited step has, where the captured one is 0."""
    rate = assumed.rate if assumed is not None else scheduled
    now = group.options.get("lr")
    if rate is None or not isinstance(now, (int, float)) or now != 0:
        return group
    return dataclasses.replace(group, options={**group.options, "lr": rate})
