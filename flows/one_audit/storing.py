"""What is left of an audit: rows stored, run published, version marked, audit committed, in this order."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import pyarrow as pa
from mlflow.tracking import MlflowClient

from audits.errors import GradauditError, InfrastructureError
from audits.history.reading import compare_with_earlier
from audits.report import AuditReport
from audits.results.format import answer_table, audits_table, rows_table
from audits.results.identity import AuditIdentity
from audits.results.store import ResultsStore
from flows.choosing.due_keys import environment
from flows.settings.environment import GradauditSettings
from registry_models.marks import mark
from registry_models.publishing import publish
from registry_models.registry.versions import Version, ensure_experiment
from registry_models.report.changes import changes_of


class NotKeptError(InfrastructureError):
    """An audit was made, and could not be stored, published or marked.

    Attributes:
        report: what it came to.
        why: what was in the way.
    """

    def __init__(self, report: AuditReport, why: GradauditError) -> None:
        super().__init__(f"{why}; the verdict was {report.outcome}")
        self.report, self.why = report, why


def store_publish_mark_commit(
    report: AuditReport,
    *,
    version: Version,
    client: MlflowClient,
    settings: GradauditSettings,
    fingerprint: str,
    key: str,
    occasion: str,
    recipe_yaml: str | None,
    rerun: str,
) -> AuditReport:
    """Store, publish, mark, commit, in this order: a crash anywhere leaves it due and no mark without proof.

    Raises:
        NotKeptError: one of them could not be done; the error has the report.
    """
    identity = report.identity
    store = ResultsStore(settings.results)
    date = identity.audited_at.date()
    with _with_the_report(report, store):
        store.write("rows", rows_table(answer_table(report.rows), identity), date=date, audit_id=identity.audit_id)
        changes = changes_of(compare_with_earlier(store, report))
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
        published = dataclasses.replace(report, run_id=run_id)
        mark(
            client,
            published,
            version,
            run_id=run_id,
            experiment_id=ensure_experiment(client, settings.experiment),
            fingerprint=fingerprint,
        )
    # From here on the version is marked: should the last write fail, its rows stay, and it is due again.
    with _with_the_report(report):
        store.write(
            "audits",
            _commit_line(published, identity, settings, fingerprint, key, occasion),
            date=date,
            audit_id=identity.audit_id,
        )
    return published


@contextlib.contextmanager
def _with_the_report(report: AuditReport, store: ResultsStore | None = None) -> Iterator[None]:
    """Turn trouble into one that carries the report; of ``store``, take its rows back whatever happened.

    Raises:
        NotKeptError: the report could not be kept.
    """
    try:
        yield
    except BaseException as error:
        if store is not None:
            identity = report.identity
            with contextlib.suppress(InfrastructureError):
                store.withdraw_rows(date=identity.audited_at.date(), audit_id=identity.audit_id)
        if isinstance(error, GradauditError):
            raise NotKeptError(report, error) from error
        raise


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
        unjudged=report.unjudged,
    )
