"""Nights on a registry of many kinds, as processes of their own: what is audited, told, marked, and the exit codes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from mlflow.tracking import MlflowClient
from torch import nn

from audits import Recipe
from registry_models import log_model
from tests.flows.cli.test_audit_command import gradaudit
from tests.flows.commands import start
from tests.stores import BATCH, register_linear


class Adder(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """A pyfunc."""

    def predict(self, context: Any, model_input: list[float]) -> list[float]:
        return [value + 1 for value in model_input]


def night(folder: Path, client: MlflowClient, *options: str) -> tuple[int, str]:
    process = start(["nightly", *options], folder, client)
    out, err = process.communicate(timeout=300)
    assert process.returncode is not None
    assert "Traceback" not in err
    return process.returncode, out


def register_others() -> None:
    sklearn = pytest.importorskip("sklearn.linear_model", reason="the extra 'demo' is not installed")
    mlflow.set_experiment("models")
    options = {"name": "m", "pip_requirements": ["torch"]}
    frozen = nn.Linear(2, 1).requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mlflow.sklearn.log_model(sklearn.LinearRegression(), registered_model_name="sk", **options)
        mlflow.pyfunc.log_model(python_model=Adder(), registered_model_name="py", **options)
        mlflow.pytorch.log_model(
            frozen, registered_model_name="frozen", serialization_format="pickle", **options,
        )  # only its audit can tell  # fmt: skip


def register_wrong(name: str) -> None:
    """The optimizer is built before the head is replaced."""
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model[2] = nn.Linear(4, 1)
    log_model(model, name, recipe=Recipe.capture(model, batch=BATCH, loss="mse_loss", optimizer=optimizer))


def outcomes(client: MlflowClient) -> dict[str, str | None]:
    return {v.name: v.tags.get("audit.outcome") for v in client.search_model_versions()}


@pytest.mark.slow
@pytest.mark.end_to_end
def test_other_flavours_are_nobodys_failure(client: MlflowClient, tmp_path: Path) -> None:
    register_others()
    register_linear("net")
    code, out = night(tmp_path, client)
    assert code == 0, out
    assert "3 versions outside the audit (1 sklearn, 1 pyfunc, 1 nothing to train)" in out
    for words in ("sklearn: sk v1 (", "pyfunc: py v1 (a pyfunc", "nothing to train: frozen v1 ("):
        assert words in out, "named when they are new"
    assert "✓ pass" in out
    assert outcomes(client) == {"net": "pass", "sk": None, "py": None, "frozen": None}
    code, out = night(tmp_path, client)
    assert (code, out.splitlines()) == (
        0,
        [
            "Nothing is due: 4 versions looked at, each with a fresh result or outside the audit.",
            "3 versions outside the audit (1 sklearn, 1 pyfunc, 1 nothing to train)",
        ],
    )


@pytest.mark.slow
@pytest.mark.end_to_end
def test_what_is_known_is_no_news(client: MlflowClient, tmp_path: Path) -> None:
    register_linear("open", pickled=True, with_recipe=False)
    code, out = night(tmp_path, client)
    assert code == 2, "in the night in which it appears"
    assert "this version has no recipe" in " ".join(out.split())
    register_wrong("wrong")
    code, out = night(tmp_path, client, "--force", "--fail-on", "newly-failed")
    assert code == 1
    assert "inconclusive" not in out, "the one without a recipe was audited again, and is counted"
    assert "1 version without a recipe, known since 20" in out
    code, out = night(tmp_path, client, "--force", "--fail-on", "newly-failed", "--verbose")
    assert (code, "inconclusive" in out) == (0, True)


@pytest.mark.slow
@pytest.mark.end_to_end
def test_one_audit_of_another_flavour(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    register_others()
    register_wrong("wrong")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)

    def audit(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        code = gradaudit("audit", *arguments, monkeypatch=monkeypatch, tmp_path=tmp_path)
        return code, capsys.readouterr().out

    code, out = audit("models:/sk/1")
    assert code == 2, "it was not judged"
    assert out.strip() == "OUTSIDE: sk v1 is outside the audit: a model of the flavour sklearn, which is not torch's."
    assert audit("models:/sk/1", "--exit-zero")[0] == 0
    code, out = audit("models:/py/1", "--json")
    told = json.loads(out)
    assert (code, told["outcome"], told["flavour"]) == (2, "outside", "pyfunc")
    for _ in range(2):  # the second time it is remembered
        code, out = audit("models:/frozen/1")
        assert (code, "no trainable parameter" in out) == (2, True)
    assert audit("models:/wrong/1")[0] == 1
    assert audit("models:/wrong/1", "--fail-on", "newly-failed")[0] == 0
    assert audit("models:/wrong/1", "--exit-zero")[0] == 0
    assert outcomes(client) == {"wrong": "fail", "sk": None, "py": None, "frozen": None}
    folder = Path(client.get_model_version_download_uri("sk", "1").removeprefix("file://"))
    code, out = audit(str(folder))
    assert (code, "is outside the audit: a model of the flavour sklearn" in out) == (2, True)
