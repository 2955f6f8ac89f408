"""Optimizers of somebody's own, right and wrong: the same verdicts in process, and from `log_model` to a nightly."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pandas as pd
import pytest
from mlflow.tracking import MlflowClient

import audits
from audits import Outcome, Recipe
from registry_models import log_model
from tests.flows.commands import start
from tests.registry_models import subclasses


def in_process(model: subclasses.Heads, recipe: Recipe) -> tuple[audits.AuditReport, set[tuple[str | None, str]]]:
    report = audits.audit(model, recipe, device="cpu")
    return report, {(row.phase, row.check) for row in report.rows if row.outcome is Outcome.FAIL}


@pytest.mark.exhaustive
@pytest.mark.end_to_end
def test_wrong_subclasses_fail_by_the_right_check_and_their_twins_pass(client: MlflowClient, tmp_path: Path) -> None:
    mlflow.set_experiment("models")
    failing: dict[str, set[tuple[str | None, str]]] = {}
    for name, wrong in (("right", False), ("wrong", True)):
        model, recipe = subclasses.trained(wrong=wrong)
        log_model(model, name, recipe=recipe, factory="tests.registry_models.subclasses:Heads")
        report, failing[name] = in_process(model, recipe)
        if not wrong:
            assert (report.outcome, report.coverage) == (Outcome.PASS, 1.0), report.headline
    assert failing["right"] == set()
    for phase, (_, _, check) in subclasses.PAIRS.items():
        assert (phase, check) in failing["wrong"]

    out, err = start(["nightly"], tmp_path, client).communicate(timeout=240)
    tags = {name: client.get_model_version(name, "1").tags for name in failing}
    assert {name: tags[name].get("audit.outcome") for name in tags} == {"right": "pass", "wrong": "fail"}, out + err
    assert float(tags["right"]["audit.coverage"]) == 1.0
    rows = pd.read_parquet(tmp_path / "results" / "rows")
    failed = rows[rows["outcome"] == "fail"]
    assert set(zip(failed["phase"], failed["check"], strict=True)) == failing["wrong"]
