"""What the results store says of the demo's versions, against what was planted in them."""

from __future__ import annotations

from collections.abc import Sequence

from audits.outcomes import Outcome, Severity
from audits.report import BATCH_PREFIX
from audits.results import ResultsStore
from flows.audit_summary import AuditSummary
from flows.demo.catalogue import DemoVersion


def committed_verdicts(results: str, versions: Sequence[DemoVersion]) -> list[AuditSummary]:
    """Return the newest committed verdict of every demo version that has one, in the demo's order."""
    store = ResultsStore(results)
    audits = store.read("audits").to_pandas().sort_values("audited_at")
    newest = audits.drop_duplicates(["model_name", "model_version"], keep="last")
    by_version = {(str(a.model_name), int(a.model_version)): a for a in newest.itertuples()}
    failed = store.read("rows", columns=["audit_id", "check", "parameter", "outcome", "severity"]).to_pylist()
    verdicts = []
    for wanted in versions:
        audit = by_version.get((wanted.name, wanted.version))
        if audit is None:
            continue
        rows = [
            row
            for row in failed
            if row["audit_id"] == audit.audit_id and row["outcome"] == Outcome.FAIL and row["severity"] == Severity.FAIL
        ]
        names = dict.fromkeys(row["parameter"] for row in rows)
        verdicts.append(
            AuditSummary(
                model=wanted.name,
                version=wanted.version,
                outcome=str(audit.outcome),
                coverage=float(audit.coverage),
                failed_checks=list(dict.fromkeys(row["check"] for row in rows)),
                failed_parameters=[name for name in names if name and not name.startswith(BATCH_PREFIX)],
                run_id=str(audit.run_id),
                seconds=float(audit.seconds),
                headline=str(audit.message),
            )
        )
    return verdicts


def surprises(verdicts: Sequence[AuditSummary], versions: Sequence[DemoVersion]) -> list[str]:
    """Return one sentence per version whose verdict is not the one that was planted."""
    outcomes = {(verdict["model"], verdict["version"]): verdict["outcome"] for verdict in verdicts}
    texts = []
    for wanted in versions:
        outcome = outcomes.get((wanted.name, wanted.version))
        expected = ("fail",) if wanted.planted else ("pass", "warn")
        if outcome not in expected:
            texts.append(
                f"{wanted.name} v{wanted.version}: {outcome or 'not audited'}, expected {' or '.join(expected)}"
            )
    return texts
