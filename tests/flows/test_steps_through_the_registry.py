"""Training steps, right and wrong, from `log_model` through a nightly sweep to the marks."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pytest
import torch
from mlflow.tracking import MlflowClient

from audits import Recipe
from registry_models import log_model
from tests.flows.commands import start
from tests.registry_models import stepping

EXPECTED = {
    "drawing": ("pass", ""),
    "rolled": ("fail", "step.gradient"),
    "raising": ("inconclusive", ""),
}


@pytest.mark.exhaustive
@pytest.mark.end_to_end
def test_each_step_gets_its_own_verdict(client: MlflowClient, tmp_path: Path) -> None:
    mlflow.set_experiment("models")
    for name in EXPECTED:
        torch.manual_seed(0)
        model = stepping.Twice()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        recipe = Recipe.capture(model, batch=stepping.batch(), loss=stepping.loss, optimizer=optimizer,
                                step=getattr(stepping, f"{name}_step"))  # fmt: skip
        log_model(model, name, recipe=recipe, factory="tests.registry_models.stepping:Twice")
    out, err = start(["nightly"], tmp_path, client).communicate(timeout=240)
    found = {name: client.get_model_version(name, "1").tags for name in EXPECTED}
    marks = {name: (tags["audit.outcome"], tags["audit.failed_checks"]) for name, tags in found.items()}
    assert marks == EXPECTED, out + err
    assert "out of data" in out + client.get_run(found["raising"]["audit.run_id"]).data.tags["mlflow.note.content"]
