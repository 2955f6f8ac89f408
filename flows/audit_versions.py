"""The flow ``audit-versions``: a list of registered versions, each a task, each audited in a child process."""

from __future__ import annotations

from typing import Any

from mlflow.tracking import MlflowClient
from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from audits.errors import InfrastructureError, InputError
from flows.audit_summary import AuditSummary, summarise
from flows.one_version import Target, audit_version, fresh_occasion
from flows.progress import listener
from flows.sandbox import reached_level
from flows.settings import GradauditSettings
from registry_models.report.text import escape_markdown
from registry_models.versions import VersionReference


def _worth_retrying(task: Any, task_run: Any, state: State[Any]) -> bool:
    """Retry when a service did not answer, never because of the model or the caller."""
    return isinstance(state.result(raise_on_failure=False), InfrastructureError)


@task(
    name="audit-version",
    task_run_name="{label}",
    retries=2,
    retry_delay_seconds=[5, 30],
    retry_condition_fn=_worth_retrying,
    persist_result=False,
    cache_policy=NO_CACHE,
)
def audit_one(reference: str, occasion: str, label: str) -> AuditSummary:
    """Audit one version, from download to commit."""
    settings = GradauditSettings.load()
    client = MlflowClient(tracking_uri=settings.tracking_uri)
    version = VersionReference.parse(reference).resolve(client)
    report = audit_version(
        Target(version, occasion), client, settings, on_stage=lambda stage: listener().stage(version.label, stage)
    )
    summary = summarise(report)
    listener().finished(summary)
    return summary


@flow(name="audit-versions", persist_result=False, validate_parameters=True)
def audit_versions(versions: list[str], occasion: str | None = None) -> Any:
    """Audit the given versions, one after the other.

    Args:
        versions: ``models:/NAME/VERSION`` references.
        occasion: why: a night's date, ``registration``; a fresh id when not given.

    Returns:
        The summaries. ``Completed`` when everything was audited (named ``CompletedWithFailures`` when models failed: a
        failing model is a result, not a crash), ``Failed`` when an audit could not be done.
    """
    occasion = occasion or fresh_occasion()
    reached_level(GradauditSettings.load().isolation)  # refuses once, before anything is downloaded
    summaries: list[AuditSummary] = []
    troubles: list[str] = []
    for reference in versions:
        label = reference.removeprefix("models:/").replace("/", " v")
        try:
            summaries.append(audit_one(reference, occasion, label))
        except (InfrastructureError, InputError) as error:
            troubles.append(f"{reference}: {error}")
    create_markdown_artifact(_markdown(summaries, troubles), key="audit-versions", description="Audited versions")
    if troubles:
        return Failed(message=f"{len(troubles)} of {len(versions)} audits could not be done: {troubles[0]}")
    failures = sum(1 for summary in summaries if summary["outcome"] == "fail")
    if failures:
        return Completed(name="CompletedWithFailures", message=f"{failures} versions failed", data=summaries)
    return summaries


def _markdown(summaries: list[AuditSummary], troubles: list[str]) -> str:
    lines = ["| model | version | outcome | failed checks | first parameter |", "|---|---|---|---|---|"]
    for s in summaries:
        first = s["failed_parameters"][0] if s["failed_parameters"] else ""
        cells = [s["model"], f"v{s['version']}", s["outcome"], ", ".join(s["failed_checks"]), first]
        lines.append("| " + " | ".join(escape_markdown(cell) for cell in cells) + " |")
    lines += [f"\nNot audited: {escape_markdown(trouble)}" for trouble in troubles]
    return "\n".join(lines)
