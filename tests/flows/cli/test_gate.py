"""``gradaudit gate``: the audit of exactly this version, as it is, in this environment; found, awaited or made."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow.tracking import MlflowClient
from torch import nn

from audits import Recipe
from audits.errors import SettingsError
from flows.ages import age_of
from flows.choosing.due_keys import due_key
from flows.choosing.sweeping import REGISTRATION, Sweep
from flows.one_audit.one_version import Target, audit_version, fresh_occasion
from flows.settings.environment import GradauditSettings
from registry_models import log_model
from registry_models.registry.versions import RECIPE_TAG, VersionReference
from tests.flows.cli.test_audit_command import gradaudit
from tests.flows.commands import start
from tests.stores import BATCH, register_linear


@pytest.fixture
def run(client: MlflowClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):  # type: ignore[no-untyped-def]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)
    return lambda *arguments: gradaudit(*arguments, monkeypatch=monkeypatch, tmp_path=tmp_path)


def register_wrong(name: str) -> int:
    """The optimizer is built before the head is replaced."""
    mlflow.set_experiment("models")
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model[2] = nn.Linear(4, 1)
    recipe = Recipe.capture(model, batch=BATCH, loss="mse_loss", optimizer=optimizer)
    return int(log_model(model, name, recipe=recipe).registered_model_version)


@pytest.mark.end_to_end
@pytest.mark.slow
def test_the_gate_makes_one_audit_and_believes_it_then(run, client: MlflowClient, capsys) -> None:  # type: ignore[no-untyped-def]
    register_linear("right")
    client.set_registered_model_alias("right", "candidate", "1")
    capsys.readouterr()
    assert run("gate", "models:/right@candidate", "--no-audit") == 2
    assert capsys.readouterr().out.startswith(
        "? no verdict: right v1, which models:/right@candidate was: it has no audit"
    )
    assert run("gate", "models:/right@candidate", "--json") == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["model"], made["version"], made["outcome"], made["made"]) == ("right", 1, "pass", True)
    assert client.get_model_version("right", "1").tags["audit.outcome"] == "pass"
    assert run("gate", "models:/right/1", "--max-age", "1h", "--no-audit") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("✓ pass: right v1 (audit ")
    assert run("gate", "models:/right/1", "--json") == 0
    assert json.loads(capsys.readouterr().out)["audit_id"] == made["audit_id"]
    assert run("gate", "models:/right/1", "--max-age", "0m", "--no-audit") == 2, "an older audit is not believed"
    assert run("gate", "models:/right/1", "--device", "cpu", "--no-audit") == 2, "nor one of another environment"
    client.set_model_version_tag("right", "1", RECIPE_TAG, "runs:/0123456789abcdef0123456789abcdef/recipe")
    assert run("gate", "models:/right/1", "--no-audit") == 2, "nor one from before the version had this recipe"


@pytest.mark.end_to_end
@pytest.mark.slow
def test_a_wrong_version_does_not_pass_the_gate(run, client: MlflowClient, capsys) -> None:  # type: ignore[no-untyped-def]
    register_wrong("wrong")
    capsys.readouterr()
    assert run("gate", "models:/wrong/1") == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("✗ fail: wrong v1 (audit ")
    assert "registration.stale" in line
    assert run("gate", "models:/wrong/2") == 2
    assert run("gate", "wrong/1") == 2


@pytest.mark.end_to_end
@pytest.mark.slow
def test_the_gate_waits_for_an_audit_under_way_and_its_alias_is_looked_up_once(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_linear("right")
    register_linear("right")
    client.set_registered_model_alias("right", "candidate", "1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)
    settings = GradauditSettings.load(results=str(tmp_path / "results"))
    version = VersionReference("right", 1).resolve(client)
    sweep = Sweep(settings, client, REGISTRATION, None)
    with sweep.claim(version, due_key(version, settings, settings.for_model("right"))):
        late = start(["gate", "models:/right/1", "--timeout", "0.5"], tmp_path, client)
        gate = start(["gate", "models:/right@candidate", "--json"], tmp_path, client)
        _, said = late.communicate(timeout=120)
        assert late.returncode == 2
        assert "another audit of right v1 has not ended within 0.5 s" in said
        assert gate.stderr is not None
        assert gate.stderr.readline() == "waiting for the audit of right v1 that is under way\n"
        client.set_registered_model_alias("right", "candidate", "2")
        report = audit_version(Target(version, fresh_occasion()), client, settings)
    printed, said = gate.communicate(timeout=120)
    assert gate.returncode == 0, said
    told = json.loads(printed)
    assert (told["version"], told["made"], told["audit_id"]) == (1, False, report.identity.audit_id)


@pytest.mark.parametrize(("text", "hours"), [("30m", 0.5), ("12h", 12), ("1.5d", 36)])
def test_an_age_is_read(text: str, hours: float) -> None:
    assert age_of(text, "--max-age") == datetime.timedelta(hours=hours)


@pytest.mark.parametrize("text", ["", "7", "7w", "-1h", "1e9d", "99999999999d", "nan h"])
def test_what_is_no_age_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="such as 30m, 12h or 7d"):
        age_of(text, "--max-age")
