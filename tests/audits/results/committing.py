"""Committed audits for tests of what reads them."""

from __future__ import annotations

import datetime
from collections.abc import Mapping

from audits.outcomes import Coverage, Outcome, ResultRow
from audits.report import AuditReport
from audits.results.format import AuditIdentity, answer_table, audits_table, rows_table
from audits.results.store import ResultsStore

PARTS = {"weights": "w", "files": "f", "sources": "s", "loss": "l", "optimizer": "o", "batch": "b", "step": "t"}
DAY = datetime.date(2026, 1, 31)


def row(outcome: str, parameter: str | None = "w", check: str = "update.rule", **values: object) -> ResultRow:
    fields = {"message": f"{outcome}!", **values}
    return ResultRow(check=check, outcome=Outcome(outcome), parameter=parameter, **fields)  # type: ignore[arg-type]


def report(
    *rows: ResultRow,
    version: int = 1,
    hour: int = 2,
    day: datetime.date = DAY,
    model: str = "m",
    audit_id: str | None = None,
    parts: Mapping[str, str] = PARTS,
    **who: str,
) -> AuditReport:
    at = datetime.datetime.combine(day, datetime.time(hour), datetime.UTC)
    identity = AuditIdentity(
        audit_id=audit_id or f"{model}-{version}-{day.day}-{hour}", audited_at=at, model_name=model,
        model_version=version, torch="2.13.0", **who,
    )  # fmt: skip
    return AuditReport(rows=rows, coverage_of=Coverage(1.0, 1.0, ("q",)), identity=identity, parts=parts)


def store_rows(store: ResultsStore, made: AuditReport) -> None:
    """What is left of an audit that was killed before its commit."""
    identity = made.identity
    table = rows_table(answer_table(made.rows), identity)
    store.write("rows", table, date=identity.audited_at.date(), audit_id=identity.audit_id)


def commit(store: ResultsStore, made: AuditReport) -> AuditReport:
    """Store an audit as `flows.one_audit.storing` does, without MLflow."""
    store_rows(store, made)
    identity = made.identity
    counts = {f"n_{name}": number for name, number in made.counts.items()}
    line = audits_table(
        identity, outcome=str(made.outcome), coverage=made.coverage, coverage_elements=1.0, seconds=1.5, run_id="r",
        fingerprint="f", due_key="k", occasion="o", message=made.headline, parts=made.parts,
        provenance={"loss": "declared"}, limits=("no step",), unresolved=made.coverage_of.unresolved, **counts,
    )  # fmt: skip
    store.write("audits", line, date=identity.audited_at.date(), audit_id=identity.audit_id)
    return made
