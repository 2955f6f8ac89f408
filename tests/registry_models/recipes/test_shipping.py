"""Callables of packages, scripts and notebooks: what travels with a version, and what is refused with a cure."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from mlflow.tracking import MlflowClient
from torch import nn

from audits import Recipe
from audits.errors import RecipeError
from audits.outcomes import Outcome
from audits.recipe.callables import CallableReference
from registry_models import attach_recipe, log_model
from registry_models.artifacts.shipping import MAXIMUM_CODE_BYTES, ship
from registry_models.recipes.main_script import has_main_guard
from tests.registry_models.auditing import in_a_child
from tests.registry_models.recipes.losses_shipped import squared, step
from tests.stores import BATCH, register_linear

LINEAR = {"factory": "torch.nn:Linear", "factory_args": {"in_features": 2, "out_features": 1}}


def recipe_of(model: nn.Module, loss: Any, **fields: Any) -> Recipe:
    return Recipe.capture(
        model, batch=BATCH, loss=loss, optimizer=torch.optim.SGD(model.parameters(), lr=0.01), **fields
    )


def near_solution() -> nn.Linear:
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.05, 1.0]]))
        model.bias.fill_(0.1)
    return model


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's folder: a script with a guard, and a module beside it that the script imports."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "helpers.py").write_text("def half(x):\n    return x / 2\n")
    (folder / "train.py").write_text(
        textwrap.dedent(
            """
            import sys
            import torch
            from helpers import half

            class Net(torch.nn.Module):
                def __init__(self):
                    super().__init__()
                    self.layer = torch.nn.Linear(2, 1)
                def forward(self, x):
                    return self.layer(x)

            def loss(model, batch):
                return half(((model(batch["inputs"]) - batch["targets"]) ** 2).mean())

            def rule(theta, gradient, state, options):
                return -options["lr"] * gradient

            if __name__ == "__main__":
                import mlflow
                from audits import Recipe
                from registry_models import log_model
                mlflow.set_tracking_uri(sys.argv[1])
                mlflow.set_experiment("models")
                torch.manual_seed(0)
                model = Net()
                batch = {"inputs": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "targets": torch.tensor([[1.0], [2.0]])}
                optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
                expect = {"optimizer_rule": rule}
                recipe = Recipe.capture(model, batch=batch, loss=loss, optimizer=optimizer, expect=expect)
                log_model(model, "from-script", recipe=recipe, factory=Net)
            """
        )
    )
    return folder


@pytest.mark.end_to_end
def test_a_script_ships_itself_and_what_it_imports(client: MlflowClient, project: Path, tmp_path: Path) -> None:
    root = str(Path(__file__).resolve().parents[3])
    environment = {**os.environ, "PYTHONPATH": root, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "train.py", client.tracking_uri]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = in_a_child(client, "models:/from-script/1", tmp_path / "a")
    assert report.outcome in (Outcome.PASS, Outcome.WARN), report.headline
    moved = [r.message for r in report.rows if r.check == "update.rule"]
    assert moved, "the script's own rule is found again under the script's name"
    assert all("train:rule's rule (expect['optimizer_rule'])" in message for message in moved), moved
    code = tmp_path / "a" / "model" / "code"
    assert sorted(path.name for path in code.glob("*.py")) == ["helpers.py", "train.py"]


@pytest.mark.end_to_end
def test_a_script_without_a_main_guard_is_refused(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            from audits.recipe.callables import CallableReference
            from registry_models.artifacts.shipping import ship

            def build():
                ...

            ship(None, factory=CallableReference.of(build, role="factory"))
            """
        )
    )
    assert not has_main_guard(script)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    command = [sys.executable, "train.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "no main guard" in done.stderr
    assert 'if __name__ == "__main__":' in done.stderr, "the cure"


@pytest.mark.end_to_end
def test_a_package_that_is_not_installed_is_shipped(client: MlflowClient, tmp_path: Path) -> None:
    mlflow.set_experiment("models")
    model = near_solution()
    log_model(model, "packaged", recipe=recipe_of(model, squared, step=step), **LINEAR)
    report = in_a_child(client, "models:/packaged/1", tmp_path / "a")
    assert report.outcome in (Outcome.PASS, Outcome.WARN), report.headline
    assert (tmp_path / "a" / "model" / "code" / "tests" / "registry_models" / "recipes" / "losses_shipped.py").is_file()
    assert report.provenance["step"] == "declared in the version"


@pytest.mark.end_to_end
def test_an_attached_recipe_brings_its_code(client: MlflowClient, tmp_path: Path) -> None:
    register_linear("late", with_recipe=False)
    attach_recipe("models:/late/1", recipe_of(near_solution(), squared), client=client)
    report = in_a_child(client, "models:/late/1", tmp_path / "a")
    assert report.outcome in (Outcome.PASS, Outcome.WARN), report.headline
    assert (tmp_path / "a" / "recipe").is_dir()


def test_a_notebook_cell_names_the_cure() -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(compile("def loss(model, batch):\n    return model(batch).sum()", "<ipython-input-1>", "exec"), namespace)
    recipe = recipe_of(nn.Linear(2, 1), namespace["loss"])
    with pytest.raises(RecipeError, match=r"notebook cell.*%%writefile losses\.py"):
        ship(recipe)


def test_a_lambda_names_the_cure() -> None:
    recipe = recipe_of(nn.Linear(2, 1), lambda model, batch: model(batch["inputs"]).sum())
    with pytest.raises(RecipeError, match=r"lambda, closure or notebook cell.*Cure: move it to a module"):
        ship(recipe)


def test_installed_code_is_not_shipped() -> None:
    assert ship(recipe_of(nn.Linear(2, 1), "mse_loss")).paths == ()
    assert ship(None, factory=CallableReference.of("sklearn.utils:shuffle", role="factory")).paths == ()


def test_what_would_replace_a_library_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prefect.py").write_text("def loss(model, batch): ...")
    monkeypatch.delitem(sys.modules, "prefect", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RecipeError, match=r"prefect\.py would replace the library"):
        ship(None, factory=CallableReference("prefect:loss"))


def test_a_folder_full_of_data_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "heavy"
    package.mkdir()
    (package / "__init__.py").write_text("def loss(model, batch): ...")
    with (package / "weights.bin").open("wb") as sink:
        sink.truncate(MAXIMUM_CODE_BYTES + 1)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RecipeError, match="more than code"):
        ship(None, factory=CallableReference("heavy:loss"))
