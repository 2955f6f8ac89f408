"""What a fresh process says of suspected first calls."""

from __future__ import annotations

import dataclasses

from audits.causes import Cause
from audits.findings.advice import with_advice, without_advice
from audits.findings.confirming import key_of
from audits.outcomes import Outcome
from audits.report import AuditReport


def settled(report: AuditReport, fresh: AuditReport | None, why_not: str = "") -> AuditReport:
    """Return the report with its suspected first calls judged by the report of a fresh process.

    Args:
        report: of the first process.
        fresh: of the second; None where there could be none.
        why_not: why not.
    """
    for r in fresh.rows if fresh is not None else ():
        if r.check == "audit.completed" and r.outcome is Outcome.INCONCLUSIVE:
            fresh, why_not = None, r.message
    suspects = {key_of(r) for r in fresh.rows if r.cause == Cause.FIRST_CALL} if fresh is not None else set()
    rows = []
    for r in report.rows:
        if r.cause != Cause.FIRST_CALL:
            rows.append(r)
        elif fresh is None:
            text = f"no fresh process could be asked ({why_not}); the audit of a registered version has one of its own"
            rows.append(dataclasses.replace(r, message=f"{without_advice(r.message)}; {text}"))
        elif key_of(r) in suspects:
            text = f"first call only: {without_advice(r.message)}; the first call of a fresh process showed it again"
            rows.append(dataclasses.replace(r, outcome=Outcome.FAIL, cause=Cause.FIRST_CALL_ONLY, message=text))
        else:
            text = f"{without_advice(r.message)}; a fresh process did not show it"
            rows.append(dataclasses.replace(r, cause=Cause.NOT_REPRODUCED, message=text))
    return dataclasses.replace(report, rows=tuple(with_advice(rows)))


def suspected(report: AuditReport) -> bool:
    """Whether a fresh process has something to tell about this report."""
    return any(r.cause == Cause.FIRST_CALL for r in report.rows)
