"""The flow ``nightly-audit``: choose what is due by the results store, then have it audited."""

from __future__ import annotations

import datetime
from typing import Any, cast

from mlflow.tracking import MlflowClient
from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from audits.compaction import compact
from audits.results import ResultsStore
from flows.audit_summary import AuditSummary
from flows.audit_versions import audit_versions
from flows.one_version import due_key, fresh_occasion
from flows.progress import listener
from flows.settings import GradauditSettings
from registry_models.versions import Version, list_versions


def choose_due(
    client: MlflowClient, settings: GradauditSettings, *, models: list[str], force: bool = False
) -> tuple[list[Version], int]:
    """Return the versions without a fresh result, oldest first, and the number of versions looked at.

    A result is fresh when the results store holds a committed audit under the version's present due key. Tags are
    never asked: copying a version copies them.
    """
    versions = list_versions(client, models)
    audit_settings = settings.audit_settings
    committed: set[tuple[str, int, str]] = set()
    if not force:
        table = ResultsStore(settings.results).read("audits", columns=["model_name", "model_version", "due_key"])
        committed = {(row["model_name"], row["model_version"], row["due_key"]) for row in table.to_pylist()}
    due = [v for v in versions if (v.name, v.version, due_key(v, settings, audit_settings)) not in committed]
    return sorted(due, key=lambda v: (v.created, v.name, v.version)), len(versions)


@flow(name="nightly-audit", persist_result=False, validate_parameters=True)
def nightly_audit(models: list[str] | None = None, force: bool = False) -> Any:
    """Audit every version that is due.

    Args:
        models: globs of model names; all without.
        force: audit what has a fresh result too.

    Returns:
        ``{"looked_at": N, "audited": [summaries]}``, ``CompletedWithFailures`` when a version failed.
    """
    settings = GradauditSettings.load()
    client = MlflowClient(tracking_uri=settings.tracking_uri)
    compact(ResultsStore(settings.results), before=datetime.datetime.now(datetime.UTC).date())
    due, looked_at = choose_due(client, settings, models=models or [], force=force)
    listener().planned(len(due))
    result: dict[str, Any] = {"looked_at": looked_at, "audited": []}
    if not due:
        return Completed(message=f"nothing is due among {looked_at} versions", data=result)
    occasion = fresh_occasion() if force else datetime.datetime.now(datetime.UTC).date().isoformat()
    state = cast("State[Any]", audit_versions([version.uri for version in due], occasion, return_state=True))
    if not state.is_completed():
        return Failed(message=state.message or "audits could not be done")
    audited: list[AuditSummary] = state.result()
    result["audited"] = audited
    failures = sum(1 for summary in audited if summary["outcome"] == "fail")
    if failures:
        return Completed(name="CompletedWithFailures", message=f"{failures} versions failed", data=result)
    return result
