"""The flow ``audit-versions``: a list of registered versions, each a task, each audited in a child process."""

from __future__ import annotations

import datetime
from typing import Any, cast

import mlflow
from mlflow.tracking import MlflowClient
from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner

from audits.errors import InfrastructureError, InputError, SetupError
from audits.naming import label_of_reference, visible
from audits.wording import listed
from flows.arguments import refuse_device
from flows.choosing.audit_summary import AuditSummary, summaries_of, summarise
from flows.choosing.due_keys import due_key
from flows.choosing.notifying import last_outcome, tell_newly_failed
from flows.choosing.outside import remember, set_aside
from flows.choosing.progress import listener
from flows.choosing.sweeping import UNDER_WAY, NotTriedError, Sweep, ending
from flows.one_audit.canary import prove_environment
from flows.one_audit.one_version import Target, audit_version, fresh_occasion
from flows.one_audit.storing import NotKeptError
from flows.sandbox import reached_level
from flows.sandbox.private_folders import remove_stale
from flows.settings.environment import GradauditSettings
from flows.team_policy import waivers_of
from registry_models.artifacts.flavours import OutsideError
from registry_models.registry.versions import VersionReference, registered
from registry_models.report.text import escape_markdown


def _worth_retrying(task: Any, task_run: Any, state: State[Any]) -> bool:
    """Retry when a service did not answer, never because of the model or the caller."""
    error = state.result(raise_on_failure=False)
    if isinstance(error, NotKeptError):
        error = error.why
    return isinstance(error, InfrastructureError) and not isinstance(error, NotTriedError | SetupError)


@task(
    name="audit-version",
    task_run_name="{label}",
    retries=2,
    retry_delay_seconds=[5, 30],
    retry_condition_fn=_worth_retrying,
    persist_result=False,
    cache_policy=NO_CACHE,
)
def audit_one(reference: str, label: str, sweep: Sweep) -> AuditSummary | None:
    """Audit one version, from download to commit, unless another sweep has just done it; None if it is outside."""
    with sweep.counting_failures(label):
        version = registered(VersionReference.parse(reference).resolve(sweep.client), sweep.client)
        results = sweep.settings.results
        _, aside = set_aside([version], sweep.client, results, committed=sweep.committed)
        if aside:
            listener().set_aside(version.label, aside[0].why)
            return None
        key = due_key(version, sweep.settings, sweep.settings.for_model(version.name))
        with sweep.claim(version, key) as found:
            if found is None:
                before = last_outcome(sweep.committed, version)
                try:
                    report = audit_version(
                        Target(version, sweep.occasion),
                        sweep.client,
                        sweep.settings,
                        on_stage=lambda stage: listener().stage(version.label, stage),
                        sweep=sweep,
                    )
                except OutsideError as error:
                    remember(version, error.outside, results)
                    listener().set_aside(version.label, error.outside.why)
                    return None
                summary = summarise(report)
                tell_newly_failed(report, before, sweep.client, sweep.settings)
            else:
                (summary,) = summaries_of([found], results)
    listener().finished(summary)
    return summary


@flow(
    name="audit-versions",
    persist_result=False,
    validate_parameters=True,
    task_runner=cast("Any", ThreadPoolTaskRunner(max_workers=UNDER_WAY)),
)
def audit_versions(versions: list[str], occasion: str | None = None, chosen_at: datetime.datetime | None = None) -> Any:
    """Audit the given versions, one after the other; the next is downloaded while one is audited.

    Args:
        versions: ``models:/NAME/VERSION`` references.
        occasion: why: a night's date, ``registration``; a fresh id when not given.
        chosen_at: when they were chosen; what another sweep has committed since then is not audited again.

    Returns:
        The summaries; versions outside the audit have none. ``Completed`` when everything was audited (named
        ``CompletedWithFailures`` when models failed: a failing model is a result, not a crash), ``Failed`` when an
        audit could not be done.
    """
    settings = GradauditSettings.load()
    reached_level(settings.isolation)  # refuses once, before anything is downloaded
    refuse_device(settings.device)
    waivers_of(settings)
    remove_stale()
    sweep = Sweep(settings, MlflowClient(tracking_uri=settings.tracking_uri), occasion or fresh_occasion(), chosen_at)
    mlflow.set_tracking_uri(settings.tracking_uri)  # once: downloads run beside each other
    with ending(sweep.stopping):
        prove_environment(settings, stopping=sweep.stopping)
        futures = [audit_one.submit(reference, label_of_reference(reference), sweep) for reference in versions]
        results = [future.result(raise_on_failure=False) for future in futures]
    summaries: list[AuditSummary] = []
    troubles: list[str] = []
    outside: list[str] = []
    for reference, result in zip(versions, results, strict=True):
        if isinstance(result, InfrastructureError | InputError):
            troubles.append(f"{visible(reference)}: {result}")
        elif isinstance(result, Exception):  # whatever it is, it is this version's: the others have their results
            troubles.append(f"{visible(reference)}: {type(result).__name__}: {result}")
        elif isinstance(result, BaseException):
            raise result
        elif result is None:
            outside.append(label_of_reference(reference))
        else:
            summaries.append(result)
    create_markdown_artifact(
        _markdown(summaries, troubles, outside), key="audit-versions", description="Audited versions"
    )
    if troubles:
        return Failed(message=f"{len(troubles)} of {len(versions)} audits could not be done: {'; '.join(troubles[:5])}")
    failures = sum(1 for summary in summaries if summary["outcome"] == "fail")
    if failures:
        return Completed(name="CompletedWithFailures", message=f"{failures} versions failed", data=summaries)
    return summaries


def _markdown(summaries: list[AuditSummary], troubles: list[str], outside: list[str]) -> str:
    lines = ["| model | version | outcome | failed checks | first parameter |", "|---|---|---|---|---|"]
    for s in summaries:
        first = s["failed_parameters"][0] if s["failed_parameters"] else ""
        cells = [s["model"], f"v{s['version']}", s["outcome"], ", ".join(s["failed_checks"]), first]
        lines.append("| " + " | ".join(escape_markdown(cell) for cell in cells) + " |")
    lines += [f"\nOutside the audit: {escape_markdown(listed(outside, 50))}"] if outside else []
    lines += [f"\nNot audited: {escape_markdown(trouble)}" for trouble in troubles]
    return "\n".join(lines)
