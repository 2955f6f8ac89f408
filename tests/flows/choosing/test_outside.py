"""Versions outside the audit, as MLflow logs them: told without their weights, once, and remembered."""

from __future__ import annotations

import shutil
import threading
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import mlflow
import pytest
import torch
from mlflow.tracking import MlflowClient
from torch import nn

from audits.results.committed import CommittedAudits
from audits.results.kinds import FOLDER
from audits.results.store import ResultsStore
from flows.choosing.due import plan_night
from flows.choosing.night_summary import summarise_night
from flows.choosing.outside import in_words, remembered, set_aside
from flows.choosing.recipes_missing import known_without_recipe
from flows.service import webhook
from flows.settings.environment import GradauditSettings
from registry_models import attach_recipe, log_model
from registry_models.registry.versions import list_versions
from tests.flows.choosing.committing import commit
from tests.stores import linear_recipe, register_linear

pytestmark = pytest.mark.slow


class Adder(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """A pyfunc."""

    def predict(self, context: Any, model_input: list[float]) -> list[float]:
        return [value + 1 for value in model_input]


class Wrapped(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """A pyfunc around a torch model."""

    def predict(self, context: Any, model_input: list[float]) -> list[float]:
        return model_input


@pytest.fixture
def settings(client: MlflowClient, tmp_path: Path) -> GradauditSettings:
    return GradauditSettings.load(tracking_uri=client.tracking_uri, results=str(tmp_path / "results"))


def log_others(folder: Path) -> None:
    """Register versions outside the audit: ``sk``, ``py``, ``frozen``; and one that is inside: ``wrapped``."""
    sklearn = pytest.importorskip("sklearn.linear_model", reason="the extra 'demo' is not installed")
    mlflow.set_experiment("models")
    options = {"name": "m", "pip_requirements": ["scikit-learn"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mlflow.sklearn.log_model(sklearn.LinearRegression(), registered_model_name="sk", **options)
        mlflow.pyfunc.log_model(python_model=Adder(), registered_model_name="py", **options)
        torch.save(nn.Linear(2, 1).state_dict(), folder / "net.pt")
        mlflow.pyfunc.log_model(
            python_model=Wrapped(),
            artifacts={"net": str(folder / "net.pt")},
            registered_model_name="wrapped",
            **options,
        )
        log_model(nn.Linear(2, 1).requires_grad_(False), "frozen", input_example=torch.ones(1, 2).numpy())


def place_of(client: MlflowClient, name: str) -> Path:
    return Path(unquote(urlparse(client.get_model_version_download_uri(name, "1")).path))


def parted(client: MlflowClient, settings: GradauditSettings, **options: Any) -> tuple[list[str], dict[str, str]]:
    inside, aside = set_aside(list_versions(client), client, settings.results, **options)
    return sorted(v.name for v in inside), {one.version.name: one.flavour for one in aside}


def test_a_registry_of_many_kinds_is_parted_once_without_any_weights(
    client: MlflowClient, settings: GradauditSettings, tmp_path: Path
) -> None:
    log_others(tmp_path)
    register_linear("net")
    register_linear("open", pickled=True, with_recipe=False)
    for name in ("sk", "py", "net", "open"):  # what is downloaded would be missed
        for weights in [*place_of(client, name).rglob("*.p*"), *place_of(client, name).rglob("*.skops")]:
            if weights.is_file():
                weights.unlink()
    told = (["net", "open", "wrapped"], {"sk": "sklearn", "py": "pyfunc", "frozen": "nothing to train"})
    assert parted(client, settings, keep=False) == told
    assert ResultsStore(settings.results).names_beside(FOLDER) == [], "not kept"
    assert parted(client, settings) == told
    for name in told[1]:
        shutil.rmtree(place_of(client, name))
    assert parted(client, settings) == told, "nothing is looked at twice"
    _, aside = set_aside(list_versions(client), client, settings.results)
    assert not any(one.new for one in aside)
    assert in_words(aside) == "3 versions outside the audit (1 nothing to train, 1 pyfunc, 1 sklearn)"
    assert {one.version.name for one in remembered(list_versions(client), settings.results)} == set(told[1])


def test_the_plan_of_a_night_counts_them_and_audits_none(
    client: MlflowClient, settings: GradauditSettings, tmp_path: Path
) -> None:
    log_others(tmp_path)
    register_linear("net")
    for force in (False, True):
        plan = plan_night(client, settings, force=force)
        assert sorted(due.version.name for due in plan.due) == ["net", "wrapped"]
        assert [(one.version.name, one.new) for one in plan.outside] == [
            (name, not force) for name in ("sk", "py", "frozen")
        ]
    assert plan.looked_at == 5
    committed = CommittedAudits(ResultsStore(settings.results))
    night = summarise_night(plan, committed, settings, troubles=[])
    assert night.metrics["night.outside"] == 3
    assert "3 versions outside the audit" in night.markdown()
    assert not {"models:/sk/1", "models:/py/1", "models:/frozen/1"} & set(night.not_audited)


def test_a_registration_of_one_asks_nobody_to_audit_it(
    client: MlflowClient, settings: GradauditSettings, tmp_path: Path
) -> None:
    log_others(tmp_path)
    told = webhook._hand_over("models:/sk/1", client, settings, threading.Lock())
    assert told == "it is outside the audit: a model of the flavour sklearn, which is not torch's"


def test_a_recipe_brings_a_frozen_version_in(client: MlflowClient, settings: GradauditSettings) -> None:
    mlflow.set_experiment("models")
    log_model(nn.Linear(2, 1).requires_grad_(False), "frozen", input_example=torch.ones(1, 2).numpy())
    assert parted(client, settings) == ([], {"frozen": "nothing to train"})
    attach_recipe("models:/frozen/1", linear_recipe(nn.Linear(2, 1)))
    assert parted(client, settings) == (["frozen"], {})


def test_what_cannot_be_looked_at_is_left_to_its_audit(
    client: MlflowClient, settings: GradauditSettings, tmp_path: Path
) -> None:
    client.create_registered_model("m")
    client.create_model_version("m", source=(tmp_path / "nothing").as_uri())
    for name, text in (
        ("damaged", "{"),
        ("list", "[1, 2]"),
        ("binary", "\x00\x01"),
        ("odd", "flavors: 3\nmetadata: x"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "MLmodel").write_text(text)
        client.create_registered_model(name)
        client.create_model_version(name, source=folder.as_uri())
    assert parted(client, settings) == (["binary", "damaged", "list", "m", "odd"], {})


def test_a_silent_service_hides_nothing(client: MlflowClient, settings: GradauditSettings) -> None:
    client.create_registered_model("far")
    for _ in range(5):
        client.create_model_version("far", source="http://127.0.0.1:9/nothing")
    client.create_registered_model("late")
    inside, aside = set_aside(list_versions(client), client, settings.results)
    assert (len(inside), aside) == (5, []), "they are left to their audits"


def test_what_was_audited_needs_no_look(client: MlflowClient, settings: GradauditSettings, tmp_path: Path) -> None:
    register_linear("net")
    (version,) = list_versions(client)
    commit(tmp_path, version, settings)
    committed = CommittedAudits(ResultsStore(settings.results)).refresh()
    assert parted(client, settings, committed=committed) == (["net"], {})
    assert ResultsStore(settings.results).names_beside(FOLDER) == []


def test_a_version_without_a_recipe_is_known_since_its_first_audit(
    client: MlflowClient, settings: GradauditSettings, tmp_path: Path
) -> None:
    register_linear("open", pickled=True, with_recipe=False)
    (version,) = list_versions(client)
    committed = CommittedAudits(ResultsStore(settings.results))
    assert known_without_recipe([version], committed.refresh()) == ()
    plan = plan_night(client, settings, force=True)
    commit(tmp_path, version, settings, outcome="inconclusive", unjudged="no recipe")
    night = summarise_night(plan, committed, settings, troubles=[])
    assert (night.excused, night.without_recipe) == ((), ()), "news in the night in which it appears"
    (known,) = known_without_recipe([version], committed.refresh())
    assert (known.uri, f"{known.since:%Y}") == ("models:/open/1", f"{plan.at:%Y}")
    plan = plan_night(client, settings, force=True)
    commit(tmp_path, version, settings, outcome="inconclusive", unjudged="no recipe", occasion="y")
    night = summarise_night(plan, committed, settings, troubles=[])
    assert night.excused == ("models:/open/1",)
    assert [one.uri for one in night.without_recipe] == ["models:/open/1"]
    plan = plan_night(client, settings, force=True)
    commit(tmp_path, version, settings, outcome="inconclusive", unjudged="crashed", occasion="z")
    night = summarise_night(plan, committed, settings, troubles=[])
    assert night.excused == (), "another reason is news"
    assert known_without_recipe([version], committed.refresh()) == ()
