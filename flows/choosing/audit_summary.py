"""What a sweep keeps of one audit; everything else is in the results store."""

from __future__ import annotations

import datetime
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, TypedDict

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from audits.findings.root_causes import BATCH_PREFIX
from audits.outcomes import Outcome, Severity
from audits.report import AuditReport, reason_of
from audits.results.committed import CommittedAudit
from audits.results.files import while_files_move
from audits.results.store import ResultsStore


class AuditSummary(TypedDict):
    """What a sweep keeps of one audit; everything else is in the results store."""

    model: str
    version: int
    outcome: str
    coverage: float
    failed_checks: list[str]
    failed_parameters: list[str]
    why: str
    run_id: str | None
    seconds: float
    headline: str
    unjudged: str


def summarise(report: AuditReport) -> AuditSummary:
    """Return the summary of a report."""
    return AuditSummary(
        model=report.identity.model_name,
        version=report.identity.model_version or 0,
        outcome=str(report.outcome),
        coverage=report.coverage,
        failed_checks=report.failed_checks,
        failed_parameters=report.failed_parameters,
        why=reason_of(report.headline),
        run_id=report.run_id,
        seconds=report.seconds,
        headline=report.headline,
        unjudged=report.unjudged or "",
    )


def summaries_of(audits: Sequence[CommittedAudit], results: str) -> list[AuditSummary]:
    """Return the summaries of committed audits; what failed in them is read from their rows.

    Raises:
        InfrastructureError: the results store cannot be read.
    """
    checks: dict[str, dict[str, None]] = defaultdict(dict)
    parameters: dict[str, dict[str, None]] = defaultdict(dict)
    failed = [audit for audit in audits if audit.outcome == Outcome.FAIL]
    for line in _failed_rows(failed, ResultsStore(results)) if failed else []:
        audit_id, parameter = line["audit_id"], line["parameter"]
        checks[audit_id][line["check"]] = None
        if parameter and not parameter.startswith(BATCH_PREFIX):
            parameters[audit_id][parameter] = None
    return [
        AuditSummary(
            model=audit.model_name,
            version=audit.model_version,
            outcome=audit.outcome,
            coverage=audit.coverage,
            failed_checks=list(checks[audit.audit_id]),
            failed_parameters=list(parameters[audit.audit_id]),
            why=reason_of(audit.message),
            run_id=audit.run_id,
            seconds=audit.seconds,
            headline=audit.message,
            unjudged=audit.unjudged,
        )
        for audit in audits
    ]


def _failed_rows(audits: Sequence[CommittedAudit], store: ResultsStore) -> list[dict[str, Any]]:
    days = [audit.audited_at.astimezone(datetime.UTC).date() for audit in audits]
    ids = [audit.audit_id for audit in audits]
    columns = ["audit_id", "audited_at", "row", "outcome", "severity", "waiver", "check", "parameter"]

    def read() -> pa.Table:
        files = store.files("rows", since=min(days), until=max(days))
        mine = [file for file in files if file.audit_id is None or file.audit_id in ids]
        return store.read("rows", columns=columns, filter=ds.field("audit_id").isin(ids), files=mine)

    table = while_files_move(read)
    failed = pc.and_(pc.equal(table["outcome"], str(Outcome.FAIL)), pc.equal(table["severity"], str(Severity.FAIL)))
    wanted = pc.and_(failed, pc.is_null(table["waiver"]))
    lines: list[dict[str, Any]] = table.filter(wanted).sort_by("row").to_pylist()
    return lines
