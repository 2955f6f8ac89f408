"""Reports without an audit, and reports with the name of what was audited. Knows no torch: parents of audits use it."""

from __future__ import annotations

import dataclasses

from audits.causes import Cause
from audits.findings.advice import with_advice
from audits.outcomes import Coverage, Outcome, ResultRow
from audits.report import AuditReport
from audits.results.identity import AuditIdentity


def refused(message: str, *, cause: str = Cause.REFUSED, identity: AuditIdentity | None = None) -> AuditReport:
    """Return the report of an audit that could not run: one inconclusive row with the cause."""
    row = ResultRow(check="audit.completed", outcome=Outcome.INCONCLUSIVE, cause=cause, message=message)
    empty = Coverage(tensors=0.0, elements=0.0, unresolved=())
    return AuditReport(rows=tuple(with_advice([row])), coverage_of=empty, identity=identity or AuditIdentity())


def with_identity(report: AuditReport, **fields: object) -> AuditReport:
    """Return the report with identity fields filled in."""
    return dataclasses.replace(report, identity=dataclasses.replace(report.identity, **fields))  # type: ignore[arg-type]
