"""`log_model` takes every form in which a loss calls a model, in every format, with or without an example."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from mlflow.tracking import MlflowClient
from torch import nn

from audits import Recipe
from audits.errors import ArtifactError
from registry_models import log_model
from tests.registry_models.auditing import audited
from tests.registry_models.recipes.call_forms import FORMS
from tests.registry_models.registry.test_versions import fetch

#: Forms whose tensors can be given by position: they are written as pt2.
BY_POSITION = {
    "one",
    "positional",
    "keyword",
    "keyword_turned",
    "mixed",
    "scalar_tensor",
    "twice",
    "positional in float64",
}

#: Of these MLflow stores the example too: one array.
STORED = {"one"}

PICKLED = "pickled"
FACTORY = "factory"
FORMATS = {PICKLED: {}, "factory, pickle": {"serialization_format": "pickle"}, "factory, pt2": {"export_model": True}}


def logged(form: str, way: str, **options: Any) -> nn.Module:
    """Log the form's model and return it."""
    mlflow.set_experiment("models")
    kind, arguments, loss, batch = FORMS[form]
    model = kind(**arguments)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = Recipe.capture(model, batch=batch, loss=loss, optimizer=optimizer)
    if way != PICKLED:
        options |= {"factory": kind, "factory_args": arguments}
    log_model(model, "m", recipe=recipe, **{**FORMATS.get(way, {}), **options})
    return model


def files(client: MlflowClient, folder: Path) -> set[str]:
    return {path.name for path in fetch(client, "models:/m/1", folder).folder.rglob("*")}


@pytest.mark.parametrize("form", FORMS)
def test_a_factory_model_is_logged_however_its_loss_calls_it(
    client: MlflowClient, form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        model = logged(form, FACTORY)
    assert model.training
    found = files(client, tmp_path / "a")
    assert ("model.pt2" in found) == (form in BY_POSITION), caplog.text
    assert ("weights.safetensors" in found) == (form not in BY_POSITION)
    assert ("input_example.json" in found) == (form in STORED)
    said = [r.getMessage() for r in caplog.records if r.name.startswith("registry_models")]
    assert [line.partition(",")[0].partition(":")[0] for line in said] == (
        [] if form in STORED else ["m is logged without an input example"]
    )
    if form in ("positional", "nested"):
        report = audited(client, "models:/m/1", tmp_path / "b")
        assert not report.failed_checks
        assert report.coverage == 1.0


@pytest.mark.parametrize("way", FORMATS)
@pytest.mark.parametrize("form", ["keyword", "nested"])
def test_every_format_takes_it_or_says_why_not(client: MlflowClient, form: str, way: str, tmp_path: Path) -> None:
    if way == "factory, pt2" and form not in BY_POSITION:
        with pytest.raises(ArtifactError, match=r"m cannot be written as pt2: its loss calls the model with .* a dict"):
            logged(form, way)
        return
    logged(form, way)
    assert ("model.pth" in files(client, tmp_path / "a")) == (way != "factory, pt2")


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        (lambda x, t: [x, t], False),
        (lambda x, t: (x.numpy(), t.numpy()), False),
        (lambda x, t: {"x": x, "t": t}, True),
        (lambda x, t: {"x": x, "more": [t, None]}, False),
        (lambda x, t: x, True),
        (lambda x, t: np.float32(2.0), True),
        (lambda x, t: {x: t}, False),
    ],
)
@pytest.mark.parametrize("way", [PICKLED, FACTORY])
def test_an_example_of_the_callers_never_stops_it(
    client: MlflowClient, given: Any, stored: bool, way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    batch = FORMS["positional"][3]
    with caplog.at_level(logging.WARNING):
        logged("positional", way, input_example=given(batch["x"], batch["t"]))
    assert ("input_example.json" in files(client, tmp_path / "a")) == stored
    assert ("without an input example" in caplog.text) != stored


def test_a_format_that_does_not_exist_is_refused_with_the_nearest(client: MlflowClient) -> None:
    with pytest.raises(ArtifactError, match="did you mean 'pickle'"):
        logged("one", FACTORY, serialization_format="pickel")
    assert not client.search_registered_models()
