"""A night's MLflow run: its figures over time in one experiment, beside that of the audits."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping

from mlflow.entities import Metric, RunStatus
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from registry_models.registry.mlflow_values import tag_value
from registry_models.registry.versions import ensure_experiment, registry_errors


def publish_night(
    client: MlflowClient,
    *,
    experiment: str,
    occasion: str,
    headline: str,
    note: str,
    metrics: Mapping[str, float],
) -> str:
    """Publish one night as one finished run of the experiment ``EXPERIMENT-nightly`` and return the run's id.

    Args:
        client: MLflow client.
        experiment: the experiment of the audits' own runs.
        occasion: the night's date; a night's repeat is a further run.
        headline: the night in one sentence.
        note: markdown for the run's page.
        metrics: name -> number; those that are not finite are left out.

    Raises:
        InfrastructureError: MLflow does not answer.
    """
    with registry_errors("the night's run"):
        experiment_id = _experiment_beside(client, experiment)
        tags = {
            "night.occasion": occasion,
            "night.headline": tag_value(headline),
            "mlflow.note.content": tag_value(note),
            "mlflow.source.name": "gradaudit",
            "mlflow.source.type": "JOB",
        }
        run_id = str(client.create_run(experiment_id, run_name=f"night {occasion}", tags=tags).info.run_id)
        now = int(datetime.datetime.now(datetime.UTC).timestamp() * 1000)
        finite = [Metric(name, float(value), now, 0) for name, value in metrics.items() if math.isfinite(value)]
        client.log_batch(run_id, metrics=finite)
        client.set_terminated(run_id, RunStatus.to_string(RunStatus.FINISHED))
    return run_id


def _experiment_beside(client: MlflowClient, experiment: str) -> str:
    """Return the sibling's id; where the audits' artifacts have a place of their own, its are put inside it."""
    name = f"{experiment}-nightly"
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    audits = client.get_experiment(ensure_experiment(client, experiment))
    place = str(audits.artifact_location).rstrip("/")
    if place.endswith(f"/{audits.experiment_id}"):
        return ensure_experiment(client, name)  # the server's own choice
    try:
        return str(client.create_experiment(name, artifact_location=f"{place}-nightly"))
    except MlflowException:
        return ensure_experiment(client, name)
