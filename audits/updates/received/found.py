"""What the search for a reference gradient found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from audits.updates.received.reference import Reference, Start
from audits.updates.received.regrouped import Groups
from audits.updates.record.step_listener import ClippingCall


@dataclass(frozen=True)
class BeforeStep:
    """What was computed just before an optimizer's step.

    Attributes:
        reference: the nearest reference gradient found.
        error: why there is none.
        clipping: the clipping since the last optimizer step.
        agreed: whether the received gradient is the reference.
        batches: the micro-batches that the step gave to the declared loss, where they were seen.
        weighed: that micro-batches are the unit, and how they weighed, where the loss does not separate over the batch.
        scatter: by parameter, how far (rms) the same reference evaluated again lies from itself: sums in no fixed order
            (atomics on a GPU), measured where the received gradient does not agree.
        groups: the batch's rows as the step took them, where the reference was evaluated on them.
        own_draws: functions of torch with which the step draws random numbers and the declared loss does not, where the
            received gradient does not agree.
    """

    reference: Reference | None
    error: str | None
    clipping: list[ClippingCall]
    agreed: bool = False
    batches: tuple[Any, ...] | None = None
    weighed: str = ""
    scatter: Mapping[str, float] = field(default_factory=dict)
    groups: Groups | None = None
    own_draws: tuple[str, ...] = ()


@dataclass(frozen=True)
class Found:
    """The nearest reference so far: how far the received gradient is from it, and where it was evaluated from."""

    reference: Reference | None = None
    apart: float = float("inf")
    agreed: bool = False
    batches: tuple[Any, ...] | None = None
    weighed: str = ""
    start: Start | None = None
    inside: bool = False
    groups: Groups | None = None
