"""Names that collapse into each other when they are read as URLs: each version ends with its own verdict."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow.tracking import MlflowClient
from torch import nn

from audits import Recipe
from audits.naming import label_of, label_of_reference, reference_to
from flows.rerunning import rerun_of
from flows.service.webhook import wanted_version
from registry_models import log_model
from registry_models.registry.versions import VersionReference
from tests.flows.cli.test_audit_command import gradaudit
from tests.flows.commands import start
from tests.stores import BATCH, linear_recipe

pytestmark = pytest.mark.slow

#: A right model's name, a broken one's: what a URL's parser drops or cuts off makes one of the other.
TWINS = [
    ("ab", "a\nb"),
    ("c\td", "cd"),
    ("e\rf", "ef"),
    (" g", "g "),
    ("@champ", "champ"),
    ("name", "name@v"),
    ("?q=1&b", "?q=1"),
    ("h#1", "h"),
    ("i%2Fj", "i%252Fj"),
    ("caf\u00e9", "cafe\u0301"),
    ("k\u200bl", "kl"),
    ("$(touch x)`y`\"'{}", "$(touch x)"),
]
NAMES = {name: outcome for right, broken in TWINS for name, outcome in ((right, "pass"), (broken, "fail"))}


def register(client: MlflowClient, names: list[str]) -> None:
    """Register the right model and the broken one under these names, each straight from its logged model."""
    mlflow.set_experiment("models")
    right = nn.Linear(2, 1)
    with torch.no_grad():
        right.weight.copy_(torch.tensor([[1.05, 1.0]]))
        right.bias.fill_(0.1)
    broken = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(broken.parameters(), lr=0.01)
    broken.weight = nn.Parameter(broken.weight.detach().clone())  # after the optimizer took the old one
    factory = {"factory": "torch.nn:Linear", "factory_args": {"in_features": 2, "out_features": 1}}
    recipe = Recipe.capture(broken, batch=BATCH, loss="mse_loss", optimizer=optimizer)
    sources = {
        "pass": log_model(right, "right-model", recipe=linear_recipe(right), **factory).model_id,
        "fail": log_model(broken, "broken-model", recipe=recipe, **factory).model_id,
    }
    for name in names:
        client.create_registered_model(name)
        client.create_model_version(name, f"models:/{sources[NAMES[name]]}", model_id=sources[NAMES[name]])
    for name in ("right-model", "broken-model"):
        client.delete_registered_model(name)


@pytest.mark.exhaustive
@pytest.mark.end_to_end
def test_a_night_gives_every_odd_name_its_own_verdict(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    register(client, list(NAMES))
    process = start(["nightly", "--json"], tmp_path, client)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 1, err
    told = {summary["model"]: summary["outcome"] for summary in json.loads(out)["audited"]}
    assert told == NAMES
    tags = {name: client.get_model_version(name, "1").tags for name in NAMES}
    assert {name: found.get("audit.outcome") for name, found in tags.items()} == NAMES
    for name, found in tags.items():
        assert found["audit.subject"] == f"{name}/1"
        assert client.get_run(found["audit.run_id"]).data.tags["audit.model"] == name
    monkeypatch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)
    for name, outcome in NAMES.items():
        code = gradaudit("report", f"models:/{name}/1", "--json", monkeypatch=monkeypatch, tmp_path=tmp_path)
        printed = json.loads(capsys.readouterr().out)
        assert (code, printed["model"], printed["outcome"]) == (int(outcome == "fail"), name, outcome)


@pytest.mark.sampled(cases=1)
@pytest.mark.parametrize("name", ["a\nb", "c\td", "name@v", "?q=1"])
def test_the_command_line_audits_what_it_is_told(
    name: str, client: MlflowClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    register(client, [n for twins in TWINS if name in twins for n in twins])
    client.set_registered_model_alias(name, "live", "1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)
    for target in (f"models:/{name}/1", f"models:/{name}@live"):
        capsys.readouterr()
        code = gradaudit("audit", target, "--json", monkeypatch=monkeypatch, tmp_path=tmp_path)
        printed = json.loads(capsys.readouterr().out)
        assert (code, printed["model"], printed["outcome"]) == (int(NAMES[name] == "fail"), name, NAMES[name])


@pytest.mark.parametrize("name", NAMES)
def test_the_command_that_repeats_an_audit_names_the_same_version(name: str) -> None:
    shown = rerun_of(reference_to(name, 1), "sqlite:///m.db").format(options="--seed 1")
    assert shown.isprintable(), "it survives a terminal"
    printed = subprocess.run(
        ["sh", "-c", shown.replace("gradaudit ", "printf '%s\\0' ", 1)], capture_output=True, check=True
    )
    words = printed.stdout.decode().split("\0")[:-1]
    assert words == ["audit", f"models:/{name}/1", "--tracking-uri", "sqlite:///m.db", "--seed", "1"]


@pytest.mark.parametrize("name", NAMES)
def test_an_event_asks_for_the_version_it_names(name: str, client: MlflowClient) -> None:
    client.create_registered_model(name)
    client.create_model_version(name, "file:///nowhere")
    event = {"entity": "model_version", "action": "created", "data": {"name": name, "version": "1"}}
    reference = wanted_version(json.dumps(event).encode())
    assert reference is not None
    assert VersionReference.parse(reference).resolve(client).name == name


def test_labels_tell_names_apart() -> None:
    labels = [label_of(name, 1) for name in NAMES]
    assert all(label.isprintable() for label in labels)
    assert len(set(labels)) == len(labels)
    assert label_of_reference("models:/a\nb/1") == "a\\nb v1"
