"""Where an audit's result went, in lines for whoever ran it."""

from __future__ import annotations

import os
from pathlib import Path

from mlflow.tracking import MlflowClient

from audits.errors import GradauditError
from audits.naming import reference_to, shell_words
from audits.report import AuditReport
from audits.results.store import ResultsStore
from flows.settings.environment import GradauditSettings
from registry_models.registry.connecting import shown_uri
from registry_models.registry.versions import ensure_experiment


def new_folder(settings: GradauditSettings) -> str:
    """Say that the results folder is about to be made; an empty text where it is there, or no folder."""
    folder = ResultsStore(settings.results).local_folder
    if folder is None or folder.is_dir():
        return ""
    return f"results: {shown_path(folder)} is made now (--results or GRADAUDIT_RESULTS names another folder)"


def kept_in(report: AuditReport, settings: GradauditSettings, client: MlflowClient) -> list[str]:
    """Return the lines that say where a stored and published audit is: its rows, its run, its report."""
    store = ResultsStore(settings.results)
    place = settings.results if store.local_folder is None else shown_path(store.local_folder)
    again = shell_words(
        ["gradaudit", "report", reference_to(report.identity.model_name, report.identity.model_version or 0)]
    )
    lines = [f"results: {place} (`{again}` shows this audit again)"]
    if report.run_id is not None:
        lines.append(f"run: {_run_link(report.run_id, settings, client)}, with report.html among its artifacts")
    return lines


def shown_path(path: Path) -> str:
    """Return a path as it is shortest to type from here."""
    near = os.path.relpath(path)
    return str(path) if near.startswith("..") else f"./{near}"


def _run_link(run_id: str, settings: GradauditSettings, client: MlflowClient) -> str:
    uri = settings.tracking_uri
    if not uri.startswith(("http://", "https://")):
        return f"{run_id} in {shown_uri(uri)}"
    try:
        experiment = ensure_experiment(client, settings.experiment)
    except GradauditError:  # it is only a link
        return f"{run_id} in {shown_uri(uri)}"
    return f"{shown_uri(uri).rstrip('/')}/#/experiments/{experiment}/runs/{run_id}"
