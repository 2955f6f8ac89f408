"""What is left of an audit: rows stored, run published, version marked, audit committed, in this order."""

from __future__ import annotations

import dataclasses

import pyarrow as pa
from mlflow.tracking import MlflowClient

from audits.report import AuditReport
from audits.result_format import AuditIdentity, answer_table, audits_table, rows_table
from audits.results import ResultsStore
from audits.stored import changes_since
from flows.keys import environment
from flows.settings import GradauditSettings
from registry_models.marking import mark
from registry_models.publishing import publish
from registry_models.report import changes_of
from registry_models.versions import Version, ensure_experiment


def keep(
    report: AuditReport,
    version: Version,
    client: MlflowClient,
    settings: GradauditSettings,
    *,
    fingerprint: str,
    key: str,
    occasion: str,
    recipe_yaml: str | None,
    rerun: str,
) -> AuditReport:
    """Store, publish, mark, commit, in this order: a crash anywhere leaves it due and no mark without proof."""
    identity = report.identity
    store = ResultsStore(settings.results)
    date = identity.audited_at.date()
    store.write("rows", rows_table(answer_table(report.rows), identity), date=date, audit_id=identity.audit_id)
    changes = changes_of(changes_since(store, report))
    run_id = publish(
        client,
        report,
        version,
        experiment=settings.experiment,
        fingerprint=fingerprint,
        rerun=rerun,
        recipe_yaml=recipe_yaml,
        changes=changes,
    )
    report = dataclasses.replace(report, run_id=run_id)
    mark(
        client,
        report,
        version,
        run_id=run_id,
        experiment_id=ensure_experiment(client, settings.experiment),
        fingerprint=fingerprint,
    )
    store.write(
        "audits",
        _commit_line(report, identity, settings, fingerprint, key, occasion),
        date=date,
        audit_id=identity.audit_id,
    )
    return report


def _commit_line(
    report: AuditReport,
    identity: AuditIdentity,
    settings: GradauditSettings,
    fingerprint: str,
    key: str,
    occasion: str,
) -> pa.Table:
    counts = report.counts
    return audits_table(
        identity,
        outcome=str(report.outcome),
        coverage=report.coverage,
        coverage_elements=report.coverage_of.elements,
        n_pass=counts["pass"],
        n_warn=counts["warn"],
        n_fail=counts["fail"],
        n_inconclusive=counts["inconclusive"],
        n_skipped=counts["skipped"],
        seconds=report.seconds,
        run_id=report.run_id,
        fingerprint=fingerprint,
        due_key=key,
        environment=environment(settings),
        occasion=occasion,
        message=report.headline,
        parts=report.parts,
        provenance=report.provenance,
        limits=report.limits,
        unresolved=report.coverage_of.unresolved,
        waivers=report.waivers,
    )
