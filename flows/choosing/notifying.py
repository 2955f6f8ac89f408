"""New failures, told once: an event on the Prefect server that automations turn into messages.

`gradaudit setup --notify BLOCK` makes the automation; its template reads the payload below.
"""

from __future__ import annotations

import logging
import uuid

from mlflow.tracking import MlflowClient
from prefect.events import emit_event

from audits.naming import label_of
from audits.outcomes import Outcome
from audits.report import AuditReport
from audits.results.committed import CommittedAudits
from flows.settings.environment import GradauditSettings
from registry_models.registry.versions import Version, ensure_experiment

_log = logging.getLogger(__name__)

#: The event that a flow emits, once, when an audit of a version fails and the one before it did not.
NEWLY_FAILED = "gradaudit.version.newly-failed"

#: Parameters and characters of a finding that a message holds; the report has them all.
_NAMED, _LONGEST = 20, 600

#: So that a second telling of one audit is one event.
_NAMESPACE = uuid.UUID("5b7c6d0e-6a1f-5c6b-9d0a-0d6f3a6f6b1e")


def last_outcome(committed: CommittedAudits, version: Version) -> str | None:
    """Return what the version's last committed audit came to; None when it was never audited."""
    audits = committed.refresh().of(version.name, version.version)
    return audits[-1].outcome if audits else None


def tell_newly_failed(
    report: AuditReport, before: str | None, client: MlflowClient, settings: GradauditSettings
) -> bool:
    """Emit the event when a committed audit fails and the one before it did not; say whether it was.

    Args:
        report: an audit of a registered version, as it was committed.
        before: the outcome of the version's audit before it, None when there was none.
        client: MLflow client, for the link's experiment.
        settings: tracking URI and experiment, for the link.

    A message that cannot be sent never spoils an audit: it is logged.
    """
    if report.outcome is not Outcome.FAIL or before == Outcome.FAIL:
        return False
    identity = report.identity
    name, version = identity.model_name, identity.model_version
    first = next((one for one in report.root_findings if one.outcome is Outcome.FAIL), None)
    try:
        event = emit_event(
            event=NEWLY_FAILED,
            resource={
                "prefect.resource.id": f"gradaudit.version.{name}.{version}",
                "prefect.resource.name": label_of(name, version),
                "prefect.resource.role": "model-version",
            },
            payload={
                "model": name,
                "version": version,
                "checks": ", ".join(report.failed_checks),
                "parameter": (report.failed_parameters or [""])[0],
                "parameters": report.failed_parameters[:_NAMED],
                "cause": (first.text if first else report.headline)[:_LONGEST],
                "finding": (first.rows[0].message if first else report.headline)[:_LONGEST],
                "previous": before or "never audited",
                "run_id": report.run_id,
                "link": link(report, client, settings),
            },
            id=uuid.uuid5(_NAMESPACE, identity.audit_id),
        )
    except Exception:  # whatever is wrong with a message, the audit is done and committed
        _log.exception("the new failure of %s could not be told", label_of(name, version))
        return False
    return event is not None


def link(report: AuditReport, client: MlflowClient, settings: GradauditSettings) -> str:
    """Return the address of the audit's run: whole for an MLflow server, MLflow's own part of it otherwise."""
    experiment = ensure_experiment(client, settings.experiment)
    place = f"#/experiments/{experiment}/runs/{report.run_id}"
    uri = settings.tracking_uri.rstrip("/")
    return f"{uri}/{place}" if uri.startswith(("http://", "https://")) else place
