"""What a sweep keeps of one audit; everything else is in the results store."""

from __future__ import annotations

from typing import TypedDict

from audits.report import AuditReport


class AuditSummary(TypedDict):
    """What a sweep keeps of one audit; everything else is in the results store."""

    model: str
    version: int
    outcome: str
    coverage: float
    failed_checks: list[str]
    failed_parameters: list[str]
    run_id: str | None
    seconds: float
    headline: str


def summarise(report: AuditReport) -> AuditSummary:
    """Return the summary of a report."""
    return AuditSummary(
        model=report.identity.model_name,
        version=report.identity.model_version or 0,
        outcome=str(report.outcome),
        coverage=report.coverage,
        failed_checks=report.failed_checks,
        failed_parameters=report.failed_parameters,
        run_id=report.run_id,
        seconds=report.seconds,
        headline=report.headline,
    )
