"""Real MLflow stores on SQLite for tests: the tables are made once a run and copied."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from mlflow.tracking import MlflowClient
from torch import nn

from audits import Recipe
from registry_models import log_model


def make_store(folder: Path) -> Path:
    """Create MLflow's tables in ``folder`` and return the database's file."""
    database = folder / "empty.db"
    MlflowClient(tracking_uri=f"sqlite:///{database}").search_registered_models()
    return database


def copy_store(empty: Path, folder: Path) -> str:
    """Return the tracking URI of a fresh copy in ``folder``, artifacts beside it."""
    shutil.copy(empty, folder / "mlflow.db")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri)
    for name in ("models", "gradaudit", "gradaudit-recipes"):
        client.create_experiment(name, artifact_location=(folder / "artifacts" / name).as_uri())
    return uri


BATCH = {"inputs": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "targets": torch.tensor([[3.0], [7.0]])}


def linear_recipe(model: nn.Module) -> Recipe:
    """The tutorial's training step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return Recipe.capture(model, batch=BATCH, loss="mse_loss", optimizer=optimizer)


def register_linear(name: str, *, pickled: bool = False, with_recipe: bool = True) -> int:
    """Register the tutorial's model under ``name`` in the current MLflow store; return the version."""
    import mlflow

    mlflow.set_experiment("models")
    model = nn.Linear(2, 1)
    with torch.no_grad():  # near the solution: from a random start one step moves the weights by their own size
        model.weight.copy_(torch.tensor([[1.05, 1.0]]))
        model.bias.fill_(0.1)
    recipe = linear_recipe(model) if with_recipe else None
    factory = {} if pickled else {"factory": "torch.nn:Linear", "factory_args": {"in_features": 2, "out_features": 1}}
    return int(log_model(model, name, recipe=recipe, **factory).registered_model_version)
