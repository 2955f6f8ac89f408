"""The flow ``nightly-audit``: choose what is due by the results store, have it audited, say what the night came to."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable
from typing import Any, cast

from mlflow.tracking import MlflowClient
from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from audits.errors import InfrastructureError
from audits.naming import reference_to
from audits.results.committed import CommittedAudits
from audits.results.compaction import compact
from audits.results.store import ResultsStore
from flows.audit_versions import audit_versions
from flows.choosing.audit_summary import summaries_of
from flows.choosing.due import Plan, plan_night
from flows.choosing.night_summary import NightSummary, committed_since, summarise_night
from flows.choosing.progress import listener
from flows.choosing.shards import cut, run_on_workers, workers_wait
from flows.one_audit.one_version import fresh_occasion
from flows.settings.environment import GradauditSettings
from registry_models.night_run import publish_night

__all__ = ["nightly_audit"]

_log = logging.getLogger(__name__)


@flow(name="nightly-audit", persist_result=False, validate_parameters=True)
def nightly_audit(models: list[str] | None = None, force: bool = False) -> Any:
    """Audit every version that is due: on the workers where there are some, in this process otherwise.

    Args:
        models: globs of model names; all without.
        force: audit what has a fresh result too.

    Returns:
        ``{"looked_at": N, "audited": [summaries], "newly_failed": [references], "fixed": [references], "again": N,
        "run_id": ID, "idle_waivers": [sentences], "not_audited": [references], "troubles": [sentences],
        "unready": [sentences], "outside": [{"model", "version", "flavour", "why", "since", "new"}],
        "without_recipe": {"versions": [references], "since": DATE}, "excused": [references]}``;
        ``CompletedWithFailures`` when a version failed, ``Failed`` when one could not be audited.
    """
    settings = GradauditSettings.load()
    client = MlflowClient(tracking_uri=settings.tracking_uri)
    began = datetime.datetime.now(datetime.UTC)
    compact(ResultsStore(settings.results), before=began.date())
    plan = plan_night(client, settings, models=models or [], force=force, now=began)
    listener().planned(len(plan.due))
    if not plan.due:
        return Completed(message=f"nothing is due among {plan.looked_at} versions", data=_result(plan, None, None))
    occasion = fresh_occasion() if force else began.date().isoformat()
    troubles = _audit(plan, settings, occasion, None if force else began)
    night = summarise_night(plan, CommittedAudits(ResultsStore(settings.results)), settings, troubles=troubles)
    for sentence in night.idle_waivers:
        _log.warning("%s", sentence)
    run_id = _publish(night, client, settings, occasion)
    _merge_tonight(settings)
    result = _result(plan, night, run_id)
    listener().ended(result)
    if night.not_audited:
        why = f": {troubles[0]}" if troubles else ""
        return Failed(message=f"{len(night.not_audited)} of {len(plan.due)} audits could not be done{why}")
    if any(summary["outcome"] == "fail" for summary in night.audited):
        return Completed(name="CompletedWithFailures", message=night.headline, data=result)
    return Completed(message=night.headline, data=result)


def _audit(plan: Plan, settings: GradauditSettings, occasion: str, chosen_at: datetime.datetime | None) -> list[str]:
    """Have the versions audited and return what went wrong."""
    if workers_wait():
        return run_on_workers(
            cut(plan.due, settings),
            occasion=occasion,
            chosen_at=chosen_at,
            at_once=settings.shards_at_once,
            on_beat=_teller(plan, settings),
        )
    references = [due.version.uri for due in plan.due]
    state = cast("State[Any]", audit_versions(references, occasion, chosen_at, return_state=True))
    if state.is_completed():
        return []
    error = state.result(raise_on_failure=False)
    return [str(error) if isinstance(error, Exception) else state.message or "audits could not be done"]


def _teller(plan: Plan, settings: GradauditSettings) -> Callable[[], None]:
    """Return what tells the listener of versions that workers have committed since it was last called."""
    committed, told = CommittedAudits(ResultsStore(settings.results)), set[str]()

    def tell() -> None:
        audits = committed_since(plan, committed.refresh())
        for summary in summaries_of([a for a in audits if a.audit_id not in told], settings.results):
            listener().finished(summary)
        told.update(audit.audit_id for audit in audits)

    return tell


def _merge_tonight(settings: GradauditSettings) -> None:
    """Merge the night's own files, so that whoever asks in the morning reads two files instead of thousands."""
    tomorrow = datetime.datetime.now(datetime.UTC).date() + datetime.timedelta(1)
    try:
        compact(ResultsStore(settings.results), before=tomorrow)
    except InfrastructureError as error:  # audits are done; the next sweep begins with a compaction
        _log.warning("the night's files were not merged: %s", error)


def _publish(night: NightSummary, client: MlflowClient, settings: GradauditSettings, occasion: str) -> str | None:
    """Leave the night's summary in Prefect and in MLflow; audits are done, so a failure here is only logged."""
    note = night.markdown()
    create_markdown_artifact(note, key="night", description=night.headline)
    create_table_artifact(night.table(), key="night-versions", description=night.headline)
    try:
        return publish_night(
            client,
            experiment=settings.experiment,
            occasion=occasion,
            headline=night.headline,
            note=note,
            metrics=night.metrics,
        )
    except InfrastructureError as error:
        _log.warning("the night's summary could not be published: %s", error)
        return None


def _result(plan: Plan, night: NightSummary | None, run_id: str | None) -> dict[str, Any]:
    known = night.without_recipe if night else plan.without_recipe

    def named(summaries: Any) -> list[str]:
        return [reference_to(s["model"], s["version"]) for s in summaries]

    return {
        "looked_at": plan.looked_at,
        "audited": list(night.audited) if night else [],
        "newly_failed": named(night.newly_failed) if night else [],
        "fixed": named(night.fixed) if night else [],
        "again": sum(1 for due in plan.due if due.reason.unchanged),
        "run_id": run_id,
        "idle_waivers": list(night.idle_waivers) if night else [],
        "not_audited": list(night.not_audited) if night else [],
        "unready": list(plan.unready),
        "troubles": list(night.troubles) if night else [],
        "outside": [
            {
                "model": one.version.name,
                "version": one.version.version,
                "flavour": one.flavour,
                "why": one.why,
                "since": f"{one.since:%Y-%m-%d}",
                "new": one.new,
            }
            for one in (night.outside if night else plan.outside)
        ],
        "without_recipe": {
            "versions": [one.uri for one in known],
            "since": f"{min(one.since for one in known):%Y-%m-%d}" if known else None,
        },
        "excused": list(night.excused) if night else [],
    }
