"""From findings to where to look: loss, data, custom layers, as the module that owns the parameter suggests."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from audits.causes import Cause
from audits.live.subject import Subject
from audits.outcomes import Outcome, ResultRow
from audits.structures import tensors_in


def diagnosed(rows: Sequence[ResultRow], subject: Subject) -> list[ResultRow]:
    """Return the rows, every finding with advice: the check's own, the owning module, and what is odd in the batch."""
    from audits.checks import CHECKS

    data = batch_oddities(subject)
    advised = []
    foreign = {(r.phase, r.parameter) for r in rows if r.check == "update.isolation" and r.outcome is Outcome.FAIL}
    for row in (_following(row, foreign) for row in rows):
        if row.outcome in (Outcome.PASS, Outcome.SKIPPED) or row.where_to_look:
            advised.append(row)
            continue
        known = CHECKS.get(row.check)
        advice = [known.where_to_look] if known and known.where_to_look else []
        if row.module and row.parameter:
            advice.append(f"{row.parameter} is held by {row.module}.")
        if (data and row.family in ("gradient", "health")) or row.check == "step.loss-finite":
            advice += data
        advised.append(dataclasses.replace(row, where_to_look=" ".join(advice) or None))
    return advised


#: What an optimizer that reaches too far brings with it: a gradient that its loss does not give, a rule not at work.
_FOLLOWING = frozenset({("step.gradient-present", Outcome.WARN), ("update.rule", Outcome.INCONCLUSIVE)})


def _following(row: ResultRow, foreign: set[tuple[str | None, str | None]]) -> ResultRow:
    """Leave a finding to the one it follows from: one cause, one cure."""
    if (row.phase, row.parameter) not in foreign or (row.check, row.outcome) not in _FOLLOWING:
        return row
    message = f"follows from {row.parameter} being in the optimizer of phase {row.phase!r}: see update.isolation"
    return dataclasses.replace(row, outcome=Outcome.SKIPPED, cause=Cause.FOREIGN, message=message)


def batch_oddities(subject: Subject) -> list[str]:
    """Name what is suspicious in the batch: non-finite, constant, or far out of range values."""
    oddities = []
    for path, tensor in tensors_in(subject.recipe.batch):
        if not tensor.is_floating_point() or tensor.numel() < 2:
            continue
        values = tensor.detach().to(torch.float64)
        if not bool(torch.isfinite(values).all()):
            oddities.append(f"The batch's {path!r} holds non-finite values: look at the preprocessing.")
        elif bool((values == values.reshape(-1)[0]).all()):
            oddities.append(f"The batch's {path!r} is constant: look at the preprocessing.")
        elif float(values.abs().max()) > LARGE_INPUT:
            oddities.append(f"The batch's {path!r} reaches {float(values.abs().max()):.3g}: is it normalised?")
    return oddities


#: Inputs beyond this are rarely meant: raw pixels end at 255, 16-bit images and audio at 65,535.
LARGE_INPUT = 1e4
