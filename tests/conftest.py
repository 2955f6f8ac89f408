"""What every test shares: no variable of the user's or of another test, and random generators that start the same."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from flows.settings.environment import quiet_defaults

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

pytest_plugins = ["tests.selection"]


def _settings() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k.startswith(("GRADAUDIT_", "MLFLOW_", "PREFECT_"))}


for _name in _settings():
    del os.environ[_name]
quiet_defaults()
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_settings() -> Iterator[None]:
    """What a test sets in the environment, or what code under test sets there for its children, ends with the test."""
    before = _settings()
    yield
    for name in _settings().keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database whose tables exist: making them takes seconds, copying it none."""
    from tests.stores import make_store

    return make_store(tmp_path_factory.mktemp("empty-store"))


@pytest.fixture
def client(empty_store: Path, tmp_path: Path) -> Iterator[MlflowClient]:
    """A client of a registry of its own, which is MLflow's current one during the test."""
    import mlflow
    from mlflow.tracking import MlflowClient

    from tests.stores import copy_store

    uri = copy_store(empty_store, tmp_path)
    mlflow.set_tracking_uri(uri)
    yield MlflowClient(tracking_uri=uri)
    mlflow.set_tracking_uri(None)
