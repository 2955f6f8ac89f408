"""Two nights on a registry in which every third version is another library's: wall time, exit codes and the table.

Registers small torch models, one in ten of them wrong and one in ten without a recipe, and scikit-learn models, pyfuncs
and modules without trainable parameters in a fresh MLflow (SQLite), then runs ``gradaudit nightly`` twice, in processes
of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import mlflow
import torch
from mlflow.tracking import MlflowClient
from sklearn.linear_model import LinearRegression
from torch import nn

from audits import Recipe
from benchmarks.nightly import environment
from registry_models import log_model

#: Of ten torch versions one is wrong and one has no recipe.
WRONG, OPEN, OF = 3, 7, 10

LINEAR: dict[str, Any] = {"factory": "torch.nn:Linear", "factory_args": {"in_features": 8, "out_features": 4}}


class Adder(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """A pyfunc."""

    def predict(self, context: Any, model_input: list[float]) -> list[float]:
        """Add one."""
        return [value + 1 for value in model_input]


def log_kinds() -> dict[str, Any]:
    """Log one model of each kind and return them by the kind's name."""
    torch.manual_seed(0)
    batch = {"inputs": torch.randn(16, 8), "targets": torch.randint(0, 4, (16,))}
    right, wrong = nn.Linear(8, 4), nn.Linear(8, 4)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in (right, wrong)]
    wrong.weight = nn.Parameter(wrong.weight.detach().clone())  # after the optimizer took the old one
    recipes = [
        Recipe.capture(model, batch=batch, loss="cross_entropy", optimizer=optimizer)
        for model, optimizer in zip((right, wrong), optimizers, strict=True)
    ]
    options: dict[str, Any] = {"name": "m", "pip_requirements": ["scikit-learn"]}
    frozen = nn.Linear(8, 4).requires_grad_(False)
    return {
        "right": log_model(right, "kind-right", recipe=recipes[0], **LINEAR),
        "wrong": log_model(wrong, "kind-wrong", recipe=recipes[1], **LINEAR),
        "open": log_model(nn.Linear(8, 4), "kind-open"),
        "sklearn": mlflow.sklearn.log_model(LinearRegression(), **options),
        "pyfunc": mlflow.pyfunc.log_model(python_model=Adder(), **options),
        "frozen": log_model(frozen, "kind-frozen", input_example=torch.ones(1, 8).numpy()),
    }


def kind_of(index: int) -> str:
    """Every third version is outside the audit; the kinds take turns."""
    if index % 3 == 2:
        return ("sklearn", "pyfunc", "frozen")[index // 3 % 3]
    return {WRONG: "wrong", OPEN: "open"}.get((index - index // 3) % OF, "right")


def register(folder: Path, number: int) -> tuple[str, Counter[str]]:
    """Register ``number`` versions; return the store and how many there are of each kind."""
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    mlflow.set_tracking_uri(uri)
    client = MlflowClient(tracking_uri=uri)
    for name in ("models", "gradaudit", "gradaudit-nightly"):
        client.create_experiment(name, artifact_location=(folder / "artifacts" / name).as_uri())
    mlflow.set_experiment("models")
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logged = log_kinds()
    for kind in ("right", "wrong", "open", "frozen"):
        client.delete_registered_model(f"kind-{kind}")
    kinds: Counter[str] = Counter()
    for index in range(number):
        kind = kind_of(index)
        name = f"team-{kind}-with-a-name-of-some-length" if index % 2 else kind
        if name not in {model.name for model in client.search_registered_models()}:
            client.create_registered_model(name)
        client.create_model_version(name, source=logged[kind].model_uri, model_id=logged[kind].model_id)
        kinds[kind] += 1
    return uri, kinds


def main() -> None:
    """Print both nights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--versions", type=int, default=200)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        uri, kinds = register(folder, arguments.versions)
        print(
            f"{arguments.versions} versions: {', '.join(f'{n} {kind}' for kind, n in kinds.most_common())}", flush=True
        )
        for title in ("first night", "second night"):
            began = time.perf_counter()
            night = subprocess.run(
                [sys.executable, "-m", "flows.cli", "nightly"],
                cwd=folder,
                env={**environment(folder, uri), "COLUMNS": os.environ.get("COLUMNS", "100")},
                capture_output=True,
                text=True,
                check=False,
            )
            print(
                f"\n{title}: {time.perf_counter() - began:.0f} s, exit code {night.returncode}\n{night.stdout}",
                flush=True,
            )
            if "Traceback" in night.stderr:
                raise SystemExit(night.stderr[-3000:])


if __name__ == "__main__":
    main()
