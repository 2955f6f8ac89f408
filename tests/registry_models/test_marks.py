"""Runs and marks on a real registry: complete, in order, never touching what is the user's."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path

import pandas as pd
import pytest
from mlflow.tracking import MlflowClient

from audits.outcomes import Coverage, Outcome, ResultRow
from audits.report import AuditReport
from audits.results.format import AuditIdentity
from registry_models.marks import BLOCK_BEGIN, mark, named_parameters, with_block
from registry_models.publishing import parameters_frame, publish
from registry_models.registry.versions import Version, VersionReference
from registry_models.report.text import escape_markdown
from registry_models.untrusted_text import neutralised
from tests.stores import register_linear

AT = datetime.datetime(2026, 1, 31, 2, 0, tzinfo=datetime.UTC)


def report(*, outcome: Outcome = Outcome.FAIL, minute: int = 0, audit_id: str = "a1") -> AuditReport:
    rows = (
        ResultRow(check="registration.coverage", outcome=Outcome.PASS),
        ResultRow(
            check="gradient.finite-difference",
            outcome=Outcome.PASS,
            parameter="weight",
            error=1e-9,
            detection_limit=1e-6,
        ),
        ResultRow(check="update.rule", outcome=outcome, parameter="weight", error=9.0, threshold=4.0, message="off"),
        ResultRow(check="update.rule", outcome=Outcome.PASS, parameter="bias", error=float("inf")),
    )
    who = AuditIdentity(
        audit_id=audit_id, audited_at=AT + datetime.timedelta(minutes=minute), model_name="m", model_version=1
    )
    return AuditReport(
        rows=rows, coverage_of=Coverage(tensors=1.0, elements=1.0, unresolved=()), identity=who, seconds=1.0
    )


def version(client: MlflowClient) -> Version:
    return VersionReference("m", 1).resolve(client)


def publish_and_mark(client: MlflowClient, what: AuditReport) -> tuple[str, bool]:
    run_id = publish(
        client,
        what,
        version(client),
        experiment="gradaudit",
        fingerprint="f",
        rerun="gradaudit audit {options}",
        recipe_yaml="schema: 1\n",
    )
    experiment = client.get_experiment_by_name("gradaudit")
    assert experiment is not None
    return run_id, mark(
        client, what, version(client), run_id=run_id, experiment_id=experiment.experiment_id, fingerprint="f"
    )


@pytest.fixture
def registered(client: MlflowClient) -> MlflowClient:
    register_linear("m")
    return client


@pytest.mark.slow
def test_a_failing_version_is_found_by_its_tag_and_its_run_is_complete(
    registered: MlflowClient, tmp_path: Path
) -> None:
    run_id, marked = publish_and_mark(registered, report())
    assert marked
    found = registered.search_model_versions("tags.`audit.outcome` = 'fail'")
    assert [(v.name, int(v.version), v.tags["audit.run_id"]) for v in found] == [("m", 1, run_id)]
    tags = found[0].tags
    assert tags["audit.failed_checks"] == "update.rule"
    assert tags["audit.failed_parameters"] == "weight"
    assert tags["audit.subject"] == "m/1"
    assert tags["audit.at"] == "2026-01-31T02:00:00.000+00:00"
    assert registered.get_registered_model("m").tags["audit.latest"] == "v1 fail"
    run = registered.get_run(run_id)
    assert run.info.run_name == "m v1"
    assert run.info.status == "FINISHED"
    assert run.data.metrics["audit.n_failed"] == 1.0
    assert run.data.metrics["audit.worst_update_error"] == 9.0, "infinite errors are counted, not logged"
    assert run.data.metrics["audit.worst_gradient_error"] == 1e-9
    artifacts = {artifact.path for artifact in registered.list_artifacts(run_id)}
    assert artifacts >= {"report.html", "parameters.json", "parameters.csv", "rows.parquet", "recipe.yaml", "rerun.sh"}
    local = registered.download_artifacts(run_id, "rows.parquet", str(tmp_path))
    assert list(pd.read_parquet(local)["parameter"].dropna()) == ["weight", "weight", "bias"]


@pytest.mark.slow
def test_a_retry_supersedes_its_own_run_and_an_older_audit_never_wins(registered: MlflowClient) -> None:
    first, _ = publish_and_mark(registered, report(minute=5))
    second, _ = publish_and_mark(registered, report(minute=6))
    assert registered.get_run(first).data.tags["superseded"] == "true"
    assert "superseded" not in registered.get_run(second).data.tags
    _, marked = publish_and_mark(registered, report(outcome=Outcome.PASS, minute=1, audit_id="older"))
    assert not marked
    assert version(registered).tags["audit.run_id"] == second


@pytest.mark.slow
def test_what_a_killed_audit_left_running_is_closed_by_the_next_audit_of_its_version(registered: MlflowClient) -> None:
    publish_and_mark(registered, report())
    experiment = registered.get_experiment_by_name("gradaudit").experiment_id

    def left_by(audit_id: str, model: str, number: str) -> str:
        tags = {"audit.id": audit_id, "audit.model": model, "audit.version": number}
        return str(registered.create_run(experiment, tags=tags).info.run_id)

    killed, other_model, other_version = left_by("k", "m", "1"), left_by("o", "o'm", "1"), left_by("v", "m", "2")
    finished, _ = publish_and_mark(registered, report(minute=7, audit_id="next"))
    status = {run: registered.get_run(run).info.status for run in (killed, other_model, other_version, finished)}
    assert status == {killed: "KILLED", other_model: "RUNNING", other_version: "RUNNING", finished: "FINISHED"}


@pytest.mark.slow
def test_copied_tags_do_not_hold_back_a_real_audit(registered: MlflowClient) -> None:
    registered.set_model_version_tag("m", "1", "audit.subject", "other/7")
    registered.set_model_version_tag("m", "1", "audit.at", "2999-01-01T00:00:00.000+00:00")
    _, marked = publish_and_mark(registered, report())
    assert marked


@pytest.mark.slow
def test_what_is_the_users_stays(registered: MlflowClient) -> None:
    registered.update_model_version("m", "1", "My words.\n\nMore of them.")
    registered.set_model_version_tag("m", "1", "owner", "me")
    registered.set_registered_model_alias("m", "champion", "1")
    publish_and_mark(registered, report())
    publish_and_mark(registered, report(outcome=Outcome.PASS, minute=9, audit_id="a2"))
    found = version(registered)
    assert found.description.startswith("My words.\n\nMore of them.\n\n" + BLOCK_BEGIN)
    assert found.description.count(BLOCK_BEGIN) == 1
    assert "PASS" in found.description
    assert "#/experiments/" in found.description
    assert found.tags["owner"] == "me"
    assert registered.get_model_version_by_alias("m", "champion").version in (1, "1")


def test_the_block_goes_where_it_was() -> None:
    described = with_block("before", "one") + "\n\nafter"
    again = with_block(described, r"two \1")
    assert again.startswith("before")
    assert again.endswith("after")
    assert "one" not in again
    assert r"two \1" in again


def test_names_are_escaped_and_capped() -> None:
    assert escape_markdown("a_[b](c)<i>") == r"a\_\[b\](c)\<i\>"
    assert named_parameters([f"p{i}" for i in range(25)]).endswith(",p19,+5")
    assert neutralised("=1+1") == "'=1+1"
    assert neutralised("@x") == "'@x"
    assert neutralised("layer.weight") == "layer.weight"


def test_the_table_has_one_line_per_parameter_worst_first() -> None:
    frame = parameters_frame(report())
    assert list(frame["parameter"]) == ["weight", "bias"]
    assert list(frame["update"]) == ["fail", "pass"]
    assert frame.loc[0, "gradient_limit"] == 1e-6


def test_the_logged_model_behind_a_version_and_behind_its_copy_shows_the_verdict(registered: MlflowClient) -> None:
    from registry_models.registry.logged_models import logged_model_of

    run_id, _ = publish_and_mark(registered, report())
    model_id = logged_model_of(registered, version(registered))
    assert model_id is not None
    model = registered.get_logged_model(model_id)
    assert model.tags["audit.outcome"] == "fail"
    assert model.tags["audit.run_id"] == run_id
    assert {m.key: m.value for m in model.metrics or []}["audit.n_failed"] == 1.0
    assert [i.model_id for i in registered.get_run(run_id).inputs.model_inputs] == [model_id]
    registered.copy_model_version("models:/m/1", "copy")
    copied = VersionReference("copy", 1).resolve(registered)
    assert logged_model_of(registered, copied) == model_id
    assert logged_model_of(registered, dataclasses.replace(copied, source="s3://somewhere/model")) is None
