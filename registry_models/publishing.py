"""An audit's MLflow run: tags, metrics, a table of parameters, the report, the rows."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.entities import Metric, RunStatus, RunTag
from mlflow.tracking import MlflowClient

from audits.outcomes import GRADIENT_EVIDENCE, UPDATE_EVIDENCE, WORST_FIRST, ResultRow, finite
from audits.report import AuditReport
from audits.results.store import write_parquet
from registry_models.registry.logged_models import link_run, logged_model_of
from registry_models.registry.mlflow_values import tag_value
from registry_models.registry.versions import Version, ensure_experiment, registry_errors
from registry_models.report.changes import Changes
from registry_models.report.note import render_markdown
from registry_models.report.plots import render_plots
from registry_models.report.rendering import render_html
from registry_models.untrusted_text import neutralised

_log = logging.getLogger(__name__)


def publish(
    client: MlflowClient,
    report: AuditReport,
    version: Version,
    *,
    experiment: str,
    fingerprint: str,
    rerun: str,
    recipe_yaml: str | None,
    changes: Changes | None = None,
) -> str:
    """Publish one audit as one finished MLflow run and return its id.

    ``changes`` is what changed since the last audited version, for the report and the note.

    A run that an earlier, interrupted attempt at the same audit left behind is tagged ``superseded`` and closed; one
    that another audit of this version left unfinished is closed.

    Raises:
        InfrastructureError: MLflow or its artifact store does not answer.
    """
    identity = report.identity
    with registry_errors("the audit's run", f"create and write runs in the experiment {experiment!r}"):
        experiment_id = ensure_experiment(client, experiment)
        _supersede(client, experiment_id, identity.audit_id)
        _close_unfinished(client, experiment_id, version)
        tags = {
            "audit.id": identity.audit_id,
            "audit.model": version.name,
            "audit.version": str(version.version),
            "audit.outcome": str(report.outcome),
            "audit.failed_checks": ",".join(report.failed_checks),
            "audit.fingerprint": fingerprint,
            "audit.artifact_kind": identity.artifact_kind,
            "audit.isolation": identity.isolation,
            "mlflow.source.name": "gradaudit",
            "mlflow.source.type": "JOB",
            "mlflow.note.content": render_markdown(report, links={}, changes=changes),
        }
        tags = {name: value if name == "audit.model" else tag_value(value) for name, value in tags.items()}
        run = client.create_run(experiment_id, run_name=version.label, tags=tags)
        run_id = str(run.info.run_id)
        now = int(identity.audited_at.timestamp() * 1000)
        model_id = logged_model_of(client, version)
        metrics = [Metric(name, value, now, 0, model_id=model_id) for name, value in _metrics(report).items()]
        client.log_batch(run_id, metrics=metrics, tags=[RunTag("audit.run_id", run_id)])
        with tempfile.TemporaryDirectory(prefix="gradaudit-publish-") as temporary:
            _write_artifacts(report, Path(temporary), rerun=rerun, recipe_yaml=recipe_yaml, changes=changes)
            client.log_artifacts(run_id, temporary)
        client.log_table(run_id, parameters_frame(report), artifact_file="parameters.json")
        if model_id is not None:
            named = ("audit.outcome", "audit.failed_checks", "audit.fingerprint")
            link_run(client, run_id, model_id, {name: tags[name] for name in named} | {"audit.run_id": run_id})
        client.set_terminated(run_id, RunStatus.to_string(RunStatus.FINISHED))
    return run_id


def parameters_frame(report: AuditReport) -> pd.DataFrame:
    """Return one line per parameter: what its gradient and its update came to, worst first."""
    lines: dict[str, dict[str, Any]] = {}
    order = {outcome: rank for rank, outcome in enumerate(WORST_FIRST)}
    worst: dict[str, int] = {}
    for row in report.rows:
        if row.parameter is None:
            continue
        line = lines.setdefault(row.parameter, {**dict.fromkeys(_COLUMNS), "parameter": row.parameter})
        worst[row.parameter] = min(worst.get(row.parameter, len(order)), order[row.counted])
        for name in ("module", "numel", "dtype"):
            line[name] = line[name] or getattr(row, name)
        if row.check == GRADIENT_EVIDENCE:
            _keep_worst(line, "gradient", row, order)
        elif row.check == UPDATE_EVIDENCE:
            _keep_worst(line, "update", row, order)
        if str(row.counted) in ("fail", "inconclusive", "warn"):
            said = f"{row.check} {row.counted}{' (waived)' if row.waiver else ''}"
            line["findings"] = ", ".join(filter(None, [line["findings"], said]))
    ranked = sorted(lines.values(), key=lambda line: worst[line["parameter"]])
    return pd.DataFrame(ranked, columns=_COLUMNS)


#: As MLflow's table shows them: a window has room for the first five or six.
_COLUMNS = [
    "parameter",
    "findings",
    "gradient",
    "update",
    "gradient_error",
    "gradient_limit",
    "update_error",
    "update_threshold",
    "gradient_norm",
    "update_norm",
    "module",
    "numel",
    "dtype",
]


def _keep_worst(line: dict[str, Any], kind: str, row: ResultRow, order: Mapping[Any, int]) -> None:
    known = line[kind]
    if known is not None and order[type(row.outcome)(known)] < order[row.counted]:
        return
    line[kind] = str(row.counted)
    line[f"{kind}_error"] = finite(row.error)
    if kind == "gradient":
        line["gradient_limit"] = finite(row.detection_limit)
        line["gradient_norm"] = finite(row.gradient_norm)
    else:
        line["update_threshold"] = finite(row.threshold)
        line["update_norm"] = finite(row.update_norm)


def _metrics(report: AuditReport) -> dict[str, float]:
    """Finite numbers only: MLflow's stores disagree about NaN."""
    counts = report.counts
    resolved = [row for row in report.rows if row.outcome.resolved]
    worst = {
        name: max((abs(e) for r in resolved if r.check == check and (e := finite(r.error)) is not None), default=None)
        for name, check in (("gradient", GRADIENT_EVIDENCE), ("update", UPDATE_EVIDENCE))
    }
    nonfinite = sum(1 for r in report.rows for v in (r.measured, r.error) if v is not None and finite(v) is None)
    values = {
        "audit.n_failed": counts["fail"],
        "audit.n_warned": counts["warn"],
        "audit.n_inconclusive": counts["inconclusive"],
        "audit.n_passed": counts["pass"],
        "audit.n_nonfinite": nonfinite,
        "audit.coverage": report.coverage,
        "audit.worst_gradient_error": worst["gradient"],
        "audit.worst_update_error": worst["update"],
        "audit.seconds": report.seconds,
    }
    return {name: float(value) for name, value in values.items() if value is not None}


def _write_artifacts(
    report: AuditReport, folder: Path, *, rerun: str, recipe_yaml: str | None, changes: Changes | None
) -> None:
    page = render_html(report, rerun=rerun, recipe_yaml=recipe_yaml, changes=changes)
    (folder / "report.html").write_text(page, encoding="utf-8")
    frame = parameters_frame(report)
    safe = frame.map(neutralised)
    safe.to_csv(folder / "parameters.csv", index=False)
    write_parquet(report.to_table(), str(folder / "rows.parquet"))
    (folder / "rerun.sh").write_text(f"#!/bin/sh\n{rerun.format(options='').strip()}\n", encoding="utf-8")
    if recipe_yaml is not None:
        (folder / "recipe.yaml").write_text(recipe_yaml, encoding="utf-8")
    plots = render_plots(report)
    if plots:
        (folder / "plots").mkdir()
        for name, png in plots.items():
            (folder / "plots" / name).write_bytes(png)


def _supersede(client: MlflowClient, experiment_id: str, audit_id: str) -> None:
    for run in client.search_runs([experiment_id], f"tags.`audit.id` = '{audit_id}'"):
        client.set_tag(run.info.run_id, "superseded", "true")
        if run.info.status == RunStatus.to_string(RunStatus.RUNNING):
            client.set_terminated(run.info.run_id, RunStatus.to_string(RunStatus.KILLED))


def _close_unfinished(client: MlflowClient, experiment_id: str, version: Version) -> None:
    """Close what a killed audit of this version left RUNNING; should it live after all, it finishes its run itself."""
    of_version = f"attributes.status = 'RUNNING' and tags.`audit.version` = '{version.version}'"
    for run in client.search_runs([experiment_id], of_version):
        if run.data.tags.get("audit.model") == version.name:
            client.set_terminated(run.info.run_id, RunStatus.to_string(RunStatus.KILLED))
