"""Where recipes come from: trusted files, tags, the version; who wins, and what a tag cannot do unnoticed."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow.tracking import MlflowClient
from torch import nn

from audits import Recipe
from audits.errors import ArtifactError, RecipeError
from audits.outcomes import Outcome
from registry_models import attach_recipe, log_model
from registry_models.artifacts import snapshot as snapshots
from registry_models.artifacts.snapshot import download_version
from registry_models.recipes.recipe_sources import matching_digest, matching_recipes
from registry_models.registry.versions import RECIPE_TAG, VersionReference
from tests.registry_models.auditing import audited, shown
from tests.registry_models.registry.test_versions import fetch
from tests.stores import BATCH, linear_recipe, register_linear


class Stacked(nn.Module):
    """Two layers, so that one can be excused."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(2, 3)
        self.head = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.backbone(x)))  # type: ignore[no-any-return]


def stacked_recipe(model: nn.Module, **fields: object) -> Recipe:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    return Recipe.capture(model, batch=BATCH, loss="mse_loss", optimizer=optimizer, **fields)  # type: ignore[arg-type]


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    folder = tmp_path / "recipes"
    folder.mkdir()
    return folder


@pytest.mark.slow
def test_a_trusted_file_gives_what_the_version_lacks(client: MlflowClient, tmp_path: Path, recipes: Path) -> None:
    mlflow.set_experiment("models")
    options = {"factory": "torch.nn:Linear", "factory_args": {"in_features": 2, "out_features": 1}}
    log_model(nn.Linear(2, 1), "team-a", input_example=BATCH["inputs"].numpy(), **options)
    before = audited(client, "models:/team-a/1", tmp_path / "a")
    assert before.outcome is Outcome.INCONCLUSIVE
    assert "nobody declared the loss" in before.headline
    (recipes / "linear.yaml").write_text(
        "models: ['team-*']\nloss: mse_loss\noptimizer: {class: SGD, options: {lr: 0.001}}\n"
    )
    after = audited(client, "models:/team-a/1", tmp_path / "b", recipes=recipes)
    assert after.outcome in (Outcome.PASS, Outcome.WARN), after.headline
    assert after.coverage == 1.0
    assert after.provenance["loss"] == "declared in recipes/linear.yaml"
    assert after.provenance["batch"].startswith("assumed: ")


@pytest.mark.slow
def test_a_trusted_file_wins_field_by_field(client: MlflowClient, tmp_path: Path, recipes: Path) -> None:
    register_linear("m")
    (recipes / "a.yaml").write_text("models: m\nclip_grad_norm: 1.0\nexpect: {optimizer: AdamW}\n")
    (recipes / "b.yaml").write_text("models: m\nexpect: {optimizer: SGD}\nprecision: native\n")
    (recipes / "other.yaml").write_text("models: other\nloss: l1_loss\n")
    report = audited(client, "models:/m/1", tmp_path / "a", recipes=recipes)
    assert report.outcome is Outcome.FAIL, "a.yaml comes before b.yaml: AdamW was meant, SGD is there"
    assert report.failed_checks == ["registration.hyperparameters"]
    assert report.provenance["expect"] == "declared in recipes/a.yaml"
    assert report.provenance["loss"] == "declared in the version"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loss: mse_loss\n", "bad.yaml must list its model names"),
        ("models: [!!python/object:os.system x]\n", "bad.yaml is not plain YAML"),
        ("models: &a [m]\nloss: *a\n", "bad.yaml: aliases"),
    ],
)
def test_a_broken_repository_stops_the_audit(
    client: MlflowClient, tmp_path: Path, recipes: Path, text: str, message: str
) -> None:
    register_linear("m")
    (recipes / "bad.yaml").write_text(text)
    with pytest.raises(ArtifactError, match=re.escape(message)):
        audited(client, "models:/m/1", tmp_path / "a", recipes=recipes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loses: mse_loss", "bad.yaml has unknown key 'loses'; did you mean 'loss'"),
        ("loss: mes_loss", "did you mean 'mse_loss'"),
        ("optimizer: {class: SGD, options: {lr: 0.1}, groups: [{parameters: ['x*']}]}", "match no trainable parameter"),
        ("optimizer: {class: SGD, options: {rate: 0.1}}", "refuses its options"),
        ("optimizer: {class: SDG}", "has no 'SDG'; did you mean 'SGD'"),
    ],
)
def test_a_wrong_field_of_a_trusted_file_is_named(
    client: MlflowClient, tmp_path: Path, recipes: Path, text: str, message: str
) -> None:
    register_linear("m")
    (recipes / "bad.yaml").write_text(f"models: m\n{text}\n")
    report = audited(client, "models:/m/1", tmp_path / "a", recipes=recipes)
    assert report.outcome is Outcome.INCONCLUSIVE
    assert message in report.headline


def test_the_digest_sees_the_files_of_its_own_model_only(recipes: Path) -> None:
    (recipes / "a.yaml").write_text("models: ['a*']\nseed: 1\n")
    (recipes / "b.yaml").write_text("models: b\nseed: 1\n")
    before = matching_digest(recipes, "a1"), matching_digest(recipes, "b")
    (recipes / "a.yaml").write_text("models: ['a*']\nseed: 2\n")
    after = matching_digest(recipes, "a1"), matching_digest(recipes, "b")
    assert before[0] != after[0]
    assert before[1] == after[1]


def test_a_repository_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is not a folder"):
        matching_recipes(tmp_path / "nothing", "m")


@pytest.mark.slow
@pytest.mark.parametrize(
    "uri",
    [
        "runs://profile@databricks/abc/audit",
        "models://x/1",
        "runs:/abc/../../../etc",
        "runs:/abc/%2e%2e/etc",
        "mlflow-artifacts:/1",
        "dbfs:/x",
        "RUNS:/x",
        "runs:/a b",
    ],
)
def test_a_tag_cannot_name_another_server_or_folder(client: MlflowClient, tmp_path: Path, uri: str) -> None:
    register_linear("tagged")
    client.set_model_version_tag("tagged", "1", RECIPE_TAG, uri)
    with pytest.raises(ArtifactError, match="of the same server only"):
        fetch(client, "models:/tagged/1", tmp_path / "a")


def test_a_tag_cannot_bring_too_much(client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register_linear("m", with_recipe=False)
    attach_recipe("models:/m/1", linear_recipe(nn.Linear(2, 1)), client=client)
    monkeypatch.setattr(snapshots, "MAXIMUM_RECIPE_FOLDER_BYTES", 100)
    with pytest.raises(ArtifactError, match="is larger than"):
        fetch(client, "models:/m/1", tmp_path / "a")
    assert not list((tmp_path / "a").glob("recipe/*")), "refused before it was downloaded"


@pytest.mark.slow
def test_a_models_tag_holds_for_all_its_versions(client: MlflowClient, tmp_path: Path) -> None:
    register_linear("m", with_recipe=False)
    register_linear("m", with_recipe=False)
    uri = attach_recipe("models:/m/1", linear_recipe(nn.Linear(2, 1)), client=client)
    client.delete_model_version_tag("m", "1", RECIPE_TAG)
    client.set_registered_model_tag("m", RECIPE_TAG, uri)
    assert fetch(client, "models:/m/2", tmp_path / "a").recipe_source == uri


@pytest.mark.slow
def test_a_tag_may_name_another_version(client: MlflowClient, tmp_path: Path) -> None:
    register_linear("good")
    register_linear("bare", with_recipe=False)
    client.set_model_version_tag("bare", "1", RECIPE_TAG, "models:/good/1")
    report = audited(client, "models:/bare/1", tmp_path / "a")
    assert report.outcome in (Outcome.PASS, Outcome.WARN), report.headline
    assert report.provenance["loss"] == f"declared in the tag {RECIPE_TAG}=models:/good/1"


@pytest.mark.sampled(cases=1)
@pytest.mark.slow
@pytest.mark.parametrize("place", ["tag", "version"])
def test_a_stop_gradient_from_a_tag_costs_coverage(client: MlflowClient, tmp_path: Path, place: str) -> None:
    mlflow.set_experiment("models")
    model = Stacked()
    recipe = stacked_recipe(model, stop_gradient=["backbone"])
    log_model(model, "m", recipe=recipe if place == "version" else stacked_recipe(model), factory=Stacked)
    if place == "tag":
        attach_recipe("models:/m/1", recipe, client=client)
    report = audited(client, "models:/m/1", tmp_path / "a")
    named = shown(report, "recipe.trusted")
    if place == "version":
        assert named == []
        return
    assert "stop_gradient=['backbone']" in named[0]
    assert report.coverage == 0.5
    assert set(report.coverage_of.unresolved) == {"backbone.weight", "backbone.bias"}
    assert report.outcome is not Outcome.PASS
    assert "excuses stop_gradient" in report.headline


@pytest.mark.slow
def test_parameters_that_a_tag_freezes_cost_coverage(client: MlflowClient, tmp_path: Path) -> None:
    mlflow.set_experiment("models")
    model = Stacked()
    log_model(model, "m", recipe=stacked_recipe(model), factory=Stacked)
    frozen = Stacked()
    frozen.backbone.requires_grad_(False)
    attach_recipe("models:/m/1", stacked_recipe(frozen, expect={"frozen": ["backbone.*"]}), client=client)
    report = audited(client, "models:/m/1", tmp_path / "a")
    assert report.coverage == 0.5
    assert "frozen parameters (2)" in shown(report, "recipe.trusted")[0]
    assert report.outcome is Outcome.INCONCLUSIVE


@pytest.mark.slow
def test_what_a_trusted_file_excuses_is_excused(client: MlflowClient, tmp_path: Path, recipes: Path) -> None:
    mlflow.set_experiment("models")
    model = Stacked()
    log_model(model, "m", recipe=stacked_recipe(model), factory=Stacked)
    recipe = dataclasses.replace(stacked_recipe(model), stop_gradient=("backbone",))
    attach_recipe("models:/m/1", recipe, client=client)
    (recipes / "m.yaml").write_text("models: m\nstop_gradient: []\n")
    report = audited(client, "models:/m/1", tmp_path / "a", recipes=recipes)
    assert shown(report, "recipe.trusted") == []
    assert report.coverage == 1.0


@pytest.mark.slow
def test_the_request_names_every_source(client: MlflowClient, tmp_path: Path, recipes: Path) -> None:
    register_linear("m")
    attach_recipe("models:/m/1", linear_recipe(nn.Linear(2, 1)), client=client)
    (recipes / "m.yaml").write_text("models: m\nseed: 3\n")
    folder = tmp_path / "a"
    folder.mkdir()
    version = VersionReference.parse("models:/m/1").resolve(client)
    request = download_version(version, client, folder, recipes=recipes).request()
    assert [source["trust"] for source in request["recipe_sources"]] == ["trusted", "tag", "version"]
    for source in request["recipe_sources"]:
        assert os.path.commonpath([source["path"], str(folder)]) == str(folder), "a sandbox needs this one folder"
    assert request["run_params"] == {}
