"""Rows of one parameter in one step that need no closer look: no gradient, no rule, an update lost to rounding."""

from __future__ import annotations

from typing import Any

from audits.causes import Cause
from audits.checks.update import LOST_SHARE
from audits.live.subject import Subject
from audits.outcomes import Lane, Outcome, ResultRow
from audits.updates.judge.expected import LOW_PRECISION
from audits.updates.record.calls import Call
from audits.updates.relations import verdict_of
from audits.updates.update_rows import norm, row


def without_gradient_row(subject: Subject, call: Call, name: str) -> ResultRow:
    """Return the row of a parameter that received no gradient: untouched, or moved all the same."""
    moved = name in call.after
    if moved:
        message = f"{name} received no gradient in step {call.step} and was moved all the same"
        return _row(subject, "update.rule", Outcome.FAIL, message, call, name, lane=Lane.NATIVE, expected=0.0,
                         measured=norm(call.moved(name) - call.before[name]))  # fmt: skip
    if name not in subject.trainable or not call.before[name].numel():
        why = "frozen" if call.before[name].numel() else "empty"
        message = f"{name} is {why} and was left alone in step {call.step}: there is no update to judge"
        return _row(subject, "update.rule", Outcome.SKIPPED, message, call, name, cause=why, lane=Lane.NATIVE)
    message = f"{name} received no gradient in step {call.step}: left alone, and its rule was not seen at work"
    return _row(
        subject, "update.rule", Outcome.INCONCLUSIVE, message, call, name, cause=Cause.NO_GRADIENT, lane=Lane.NATIVE
    )


def without_rule_row(subject: Subject, call: Call, name: str) -> ResultRow:
    """Judge a step of a class that no rule is known for: by the relations, and by what this step did."""
    if call.gradients.get(name) is None:
        return without_gradient_row(subject, call, name)
    found = verdict_of(subject, call.phase)
    what = f"{name} {'moved' if name in call.after else 'stayed'} in step {call.step}"
    if found.unable:
        return _row(subject, "update.rule", Outcome.INCONCLUSIVE, f"{what}: {found.unable}", call, name,
                         cause=Cause.NO_REFERENCE_RULE)  # fmt: skip
    message = f"{what}; its optimizer has no reference rule and is judged by relations"
    if not found.broken:
        return _row(
            subject, "update.rule", Outcome.PASS, message, call, name, cause=Cause.RELATIONS, lane=Lane.SYNTHETIC
        )
    message += f", of which {len(found.broken)} do not hold: see optimizer.invariants"
    return _row(subject, "update.rule", Outcome.WARN, message, call, name, cause=Cause.RELATIONS, lane=Lane.SYNTHETIC)


def rounding_row(subject: Subject, call: Call, name: str, share: float) -> ResultRow:
    """Return the row of ``update.lost-to-rounding``: the share of an update that was below the weights' spacing."""
    lost = share > LOST_SHARE.value
    dtype = call.before[name].dtype
    message = f"{name}: {share:.0%} of the norm of step {call.step}'s update was lost"
    if lost:
        message += f": most of it is below the spacing of {dtype}"
        message += (
            ". To do: keep float32 master weights, or round stochastically" if dtype in LOW_PRECISION
            else "; the learning rate is too small for these weights. To do: raise it, or stop training"
        )  # fmt: skip
    return _row(subject, "update.lost-to-rounding", Outcome.WARN if lost else Outcome.PASS, message, call, name,
                error=share, threshold=LOST_SHARE.value)  # fmt: skip


def _row(
    subject: Subject, check: str, outcome: Outcome, message: str, call: Call, name: str, **fields: Any
) -> ResultRow:
    return row(subject, check, outcome, message, phase=call.phase.name, step=call.step, parameter=name, **fields)
