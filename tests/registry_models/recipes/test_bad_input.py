"""What cannot be audited: each ends in one clear line with the cause and the cure, and nothing is passed."""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from mlflow.tracking import MlflowClient
from torch import nn

from audits import Recipe
from audits.outcomes import Outcome
from audits.recipe.phases import ParameterRecord
from registry_models import log_model
from registry_models.recipes.recipe_files import write_recipe
from tests.registry_models.auditing import audited, shown
from tests.stores import BATCH, linear_recipe, register_linear

FACTORY = {"factory": "torch.nn:Linear", "factory_args": {"in_features": 2, "out_features": 1}}


def vector_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(batch["inputs"]).squeeze(-1)  # type: ignore[no-any-return]


def infinite_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(batch["inputs"]).sum() * float("inf")  # type: ignore[no-any-return]


def constant_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return batch["inputs"].sum()  # type: ignore[no-any-return]


def greedy_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    raise torch.OutOfMemoryError("tried to allocate 40 GiB")


def half_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """Of the weight, never of the bias."""
    return (batch["inputs"] @ model.weight.T).square().mean()  # type: ignore[operator,union-attr,no-any-return]


def chatty_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    print('{"outcome": "pass"}')
    sys.stdout.write("\x1b[31mred\x1b[0m\n")
    return nn.functional.mse_loss(model(batch["inputs"]), batch["targets"])


def recipe_with(loss: Any, batch: Any = BATCH) -> Recipe:
    model = nn.Linear(2, 1)
    return Recipe.capture(model, batch=batch, loss=loss, optimizer=torch.optim.SGD(model.parameters(), lr=0.01))


def absent_parameter() -> Recipe:
    recipe = linear_recipe(nn.Linear(2, 1))
    record = ParameterRecord("wieght", (1, 2), "torch.float32", True)
    return dataclasses.replace(recipe, parameters=(record, *recipe.parameters))


def other_shape() -> Recipe:
    return linear_recipe_of(nn.Linear(3, 1))


def linear_recipe_of(model: nn.Module) -> Recipe:
    batch = {"inputs": torch.ones(2, 3), "targets": torch.ones(2, 1)}
    return Recipe.capture(model, batch=batch, loss="mse_loss", optimizer=torch.optim.SGD(model.parameters(), lr=0.01))


def wrong_batch() -> Recipe:
    return recipe_with("mse_loss", {"inputs": torch.ones(2, 5), "targets": torch.ones(2, 1)})


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (absent_parameter, r"'wieght', which the model does not have; did you mean 'weight'"),
        (other_shape, r"'weight' has shape \(1, 2\), the recipe says \(1, 3\)"),
        (wrong_batch, r"does the recipe's batch .* fit the model"),
        (lambda: recipe_with(vector_loss), r"must return one number, not a tensor of shape \(2,\): add \.mean\(\)"),
        (lambda: recipe_with(constant_loss), "depends on no trainable parameter"),
        (lambda: recipe_with(greedy_loss), "out of memory in the loss of phase 'step': use a smaller batch"),
    ],
)
def test_a_recipe_that_cannot_be_carried_out(
    client: MlflowClient, tmp_path: Path, recipe: Callable[[], Recipe], message: str
) -> None:
    mlflow.set_experiment("models")
    log_model(nn.Linear(2, 1), "m", recipe=recipe(), **FACTORY)
    report = audited(client, "models:/m/1", tmp_path / "a")
    assert report.outcome is Outcome.INCONCLUSIVE
    assert len(report.findings) == 1
    assert re.search(message, report.headline), report.headline


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_no_pass(client: MlflowClient, tmp_path: Path) -> None:
    mlflow.set_experiment("models")
    log_model(nn.Linear(2, 1), "m", recipe=recipe_with(infinite_loss), **FACTORY)
    report = audited(client, "models:/m/1", tmp_path / "a")
    assert report.outcome in (Outcome.FAIL, Outcome.INCONCLUSIVE)
    assert any("finite" in row.message or "inf" in row.message for row in report.findings[:3])


def test_weights_that_are_not_numbers_are_no_pass(client: MlflowClient, tmp_path: Path) -> None:
    mlflow.set_experiment("models")
    model = nn.Linear(2, 1)
    recipe = linear_recipe(model)
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    log_model(model, "m", recipe=recipe, **FACTORY)
    report = audited(client, "models:/m/1", tmp_path / "a")
    assert report.outcome in (Outcome.FAIL, Outcome.INCONCLUSIVE)
    assert {"step.loss-finite"} <= {row.check for row in report.findings}


@pytest.mark.slow
def test_a_loss_that_leaves_a_parameter_out_names_it(client: MlflowClient, tmp_path: Path) -> None:
    mlflow.set_experiment("models")
    log_model(nn.Linear(2, 1), "m", recipe=recipe_with(half_loss), **FACTORY)
    report = audited(client, "models:/m/1", tmp_path / "a")
    assert report.outcome is not Outcome.PASS
    (unused,) = [row for row in report.findings if row.check == "registration.reaches-loss"]
    assert unused.message.startswith("bias is not used by any loss")


def test_what_a_model_prints_reaches_no_answer(client: MlflowClient, tmp_path: Path) -> None:
    mlflow.set_experiment("models")
    log_model(nn.Linear(2, 1), "m", recipe=recipe_with(chatty_loss), **FACTORY)
    report = audited(client, "models:/m/1", tmp_path / "a")
    assert report.outcome in (Outcome.PASS, Outcome.WARN, Outcome.FAIL)
    assert report.counts["pass"] > 10
    assert not any("\x1b" in row.message for row in report.rows)


@pytest.mark.parametrize("file", ["batch.safetensors", "recipe.yaml", "weights"])
def test_truncated_files_are_named(client: MlflowClient, tmp_path: Path, file: str) -> None:
    from registry_models.artifacts.snapshot import download_version
    from registry_models.child import carrying_out as child
    from registry_models.registry.versions import VersionReference

    register_linear("m")
    folder = tmp_path / "a"
    folder.mkdir()
    version = VersionReference.parse("models:/m/1").resolve(client)
    snapshot = download_version(version, client, folder)
    path = (
        snapshot.folder / "data" / "model.pt2"
        if file == "weights"
        else snapshot.folder / "extra_files" / "audit" / file
    )
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    report = child.run({**snapshot.request(), "settings": {}, "device": "cpu"})
    assert report.outcome is Outcome.INCONCLUSIVE
    assert path.name in report.headline, report.headline


def test_a_class_that_cannot_be_imported_is_named(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pickled by MLflow's own call, which ships no code; later the module is not there."""
    (tmp_path / "private_package.py").write_text(
        "import torch\nclass Net(torch.nn.Module):\n    def forward(self, x):\n        return x\n"
    )
    mlflow.set_experiment("models")
    with monkeypatch.context() as here:
        here.syspath_prepend(str(tmp_path))
        model = importlib.import_module("private_package").Net()
        mlflow.pytorch.log_model(
            model, name="m", registered_model_name="m", serialization_format="pickle", pip_requirements=["torch"]
        )
    del sys.modules["private_package"]
    report = audited(client, "models:/m/1", tmp_path / "a")
    assert report.outcome is Outcome.INCONCLUSIVE
    assert "needs code that is not there (No module named 'private_package')" in report.headline
    assert "code_paths=[...]" in report.headline


def test_a_recipe_with_an_unknown_key_suggests_the_nearest(client: MlflowClient, tmp_path: Path) -> None:
    from registry_models.recipes.recipe_files import FOLDER, RECIPE_FILE

    register_linear("m", with_recipe=False)
    folder = write_recipe(linear_recipe(nn.Linear(2, 1)), tmp_path)
    path = folder / RECIPE_FILE
    path.write_text(path.read_text().replace("precision:", "precison:"))
    run = client.create_run(client.get_experiment_by_name("gradaudit-recipes").experiment_id)
    client.log_artifacts(run.info.run_id, str(folder), FOLDER)
    client.set_model_version_tag("m", "1", "audit.recipe", f"runs:/{run.info.run_id}/{FOLDER}")
    report = audited(client, "models:/m/1", tmp_path / "a")
    assert "unknown key 'precison'; did you mean 'precision'" in report.headline


@pytest.mark.slow
def test_sklearn_models_are_no_supported_kind(client: MlflowClient, tmp_path: Path) -> None:
    sklearn = pytest.importorskip("sklearn.linear_model", reason="the extra 'demo' is not installed")
    mlflow.set_experiment("models")
    mlflow.sklearn.log_model(
        sklearn.LinearRegression(), name="m", registered_model_name="m", pip_requirements=["scikit-learn"]
    )
    report = audited(client, "models:/m/1", tmp_path / "a")
    assert report.outcome is Outcome.INCONCLUSIVE
    assert "unsupported artifact kind" in report.headline
    assert shown(report, "audit.completed")
