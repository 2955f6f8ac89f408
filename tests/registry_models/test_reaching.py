"""Versions, logged and audited in the child: normalisation, what reaches the loss, the batch, a rate of 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from mlflow.tracking import MlflowClient

from audits import AuditReport, Outcome, Recipe
from registry_models import log_model
from tests.registry_models import reaching
from tests.registry_models.auditing import audited, in_a_child

pytestmark = pytest.mark.slow


def logged(client: MlflowClient, folder: Path, *, child: bool = False, factory: bool = True, step: Any = None,
           lr: float = 0.1, **options: Any) -> AuditReport:  # fmt: skip
    mlflow.set_experiment("models")
    torch.manual_seed(0)
    model = reaching.Speaker(**options)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    recipe = Recipe.capture(model, batch=reaching.batches(), loss=reaching.loss, optimizer=optimizer, step=step)
    made = {"factory": reaching.Speaker, "factory_args": options} if factory else {}
    log_model(model, "net", recipe=recipe, **made)
    return (in_a_child if child else audited)(client, "models:/net/1", folder / "audited")


def found(report: AuditReport, outcome: Outcome) -> dict[str, str]:
    return {r.check: r.message for r in report.rows if r.outcome is outcome and r.counted is outcome}


@pytest.mark.parametrize("child", [False, True], ids=["in process", "in a child"])
def test_a_mean_of_means_fails_with_nothing_declared(child: bool, client: MlflowClient, tmp_path: Path) -> None:
    report = logged(client, tmp_path, child=child, step=reaching.mean_of_means)
    assert set(found(report, Outcome.FAIL)) == {"step.gradient"}
    assert "a mean of means" in found(report, Outcome.FAIL)["step.gradient"]


def test_weighing_by_tokens_passes(client: MlflowClient, tmp_path: Path) -> None:
    assert logged(client, tmp_path, step=reaching.by_tokens).outcome is Outcome.PASS


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("factory", [False, True], ids=["pickle", "factory"])
def test_a_layer_in_a_plain_list_fails_by_its_path(factory: bool, client: MlflowClient, tmp_path: Path) -> None:
    report = logged(client, tmp_path, factory=factory, registered=False)
    assert set(found(report, Outcome.FAIL)) == {"registration.reaches-loss"}
    assert {"hidden.0.weight", "hidden.0.bias"} == set(report.failed_parameters)


def test_a_pooler_that_nobody_calls_is_one_warning(client: MlflowClient, tmp_path: Path) -> None:
    report = logged(client, tmp_path, pooler=True)
    assert report.outcome is Outcome.WARN
    assert report.coverage == 1.0
    assert set(found(report, Outcome.WARN)) == {"registration.reaches-loss"}
    assert "pooler.bias, pooler.weight" in found(report, Outcome.WARN)["registration.reaches-loss"]


def test_a_step_that_takes_labels_away_fails(client: MlflowClient, tmp_path: Path) -> None:
    report = logged(client, tmp_path, step=reaching.masking)
    assert "'labels'" in found(report, Outcome.FAIL)["step.batch-unchanged"]


def test_a_rate_of_zero_is_judged_and_named(client: MlflowClient, tmp_path: Path) -> None:
    report = logged(client, tmp_path, lr=0.0)
    assert report.outcome is Outcome.WARN
    assert report.coverage == 1.0
    assert set(found(report, Outcome.WARN)) == {"step.learning-rate"}
