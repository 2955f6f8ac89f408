"""Verdicts as result rows."""

from __future__ import annotations

from audits.causes import Cause
from audits.checks.gradient import FINITE_DIFFERENCE
from audits.devices import missing_determinism
from audits.gradients.verdicts import Verdict, describe
from audits.lanes.evaluation import Point
from audits.live.subject import LivePhase, Subject
from audits.outcomes import Lane, Outcome, ResultRow, finite


def parameter_row(
    subject: Subject, phase: LivePhase, name: str, verdict: Verdict, point: Point | None, lane: Lane, dtype: str
) -> ResultRow:
    """Return a parameter's row."""
    norms = (
        (point.theta_norms[name], point.gradients.norms[name]) if point is not None and name in point.names else None
    )
    missing = missing_determinism(subject.device) if verdict.cause == Cause.NONDETERMINISTIC else ""
    return ResultRow(
        check=FINITE_DIFFERENCE.name,
        outcome=verdict.outcome,
        severity=FINITE_DIFFERENCE.severity,
        phase=phase.name,
        lane=lane,
        parameter=name,
        module=subject.owner(name).label,
        numel=subject.parameters[name].numel(),
        dtype=dtype,
        **verdict.numbers,
        parameter_norm=finite(norms[0]) if norms is not None else None,
        gradient_norm=finite(norms[1]) if norms is not None else None,
        seed=subject.seed,
        cause=verdict.cause,
        message=(verdict.message or describe(name, verdict)) + missing,
        where_to_look=verdict.where_to_look,
    )


def skipped_row(subject: Subject, phase: LivePhase, name: str, cause: str, message: str, dtype: str) -> ResultRow:
    """Return the row of a parameter that this phase does not train."""
    return parameter_row(
        subject, phase, name, Verdict(outcome=Outcome.SKIPPED, cause=cause, message=message), None, Lane.FLOAT64, dtype
    )
