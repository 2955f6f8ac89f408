"""A real MLflow server as a company has it: basic authentication, a path prefix, artifacts through the server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.tracking import MlflowClient

from tests.gateway import USERS, Door, guarded_mlflow
from tests.stores import register_linear

pytestmark = pytest.mark.end_to_end


def logged_in(user: str) -> dict[str, str]:
    return {"MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": USERS[user]}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    with guarded_mlflow(tmp_path_factory.mktemp("server")) as door:
        yield door


@pytest.fixture
def door(server: Door, monkeypatch: pytest.MonkeyPatch) -> Iterator[Door]:
    """The server with the writer logged in here, and nothing broken."""
    for name, value in logged_in("writer").items():
        monkeypatch.setenv(name, value)
    mlflow.set_tracking_uri(server.url)
    yield server
    server.broken = None
    mlflow.set_tracking_uri(None)


def gradaudit(
    folder: Path, *arguments: str, uri: str, user: str | None = "writer", **more: str
) -> subprocess.CompletedProcess[str]:
    """Run the command as its own process."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_TRACKING", "GRADAUDIT_"))}
    environment |= {
        **(logged_in(user) if user else {}),
        "MLFLOW_TRACKING_URI": uri,
        "HOME": str(folder / "home"),
        "PREFECT_HOME": str(folder / "prefect"),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        **more,
    }
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments],
        cwd=folder, env=environment, text=True, capture_output=True, timeout=300, check=False,
    )  # fmt: skip


def client_of(door: Door) -> MlflowClient:
    return MlflowClient(tracking_uri=door.url)


def test_every_json_is_json_and_nothing_else(door: Door, tmp_path: Path) -> None:
    name = "json \n@v"
    register_linear(name)
    commands: list[tuple[list[str], set[str]]] = [
        (["audit", f"models:/{name}/1"], {"outcome", "run_id"}),
        (["report", f"models:/{name}/1"], {"outcome", "run_id"}),
        (["diff", f"models:/{name}/1", f"models:/{name}/1"], {"differences"}),
        (["nightly", "--models", name, "--force"], {"audited", "run_id"}),
        (["history", name], set()),
        (["sql", "SELECT outcome FROM audits"], set()),
    ]
    for arguments, keys in commands:
        ended = gradaudit(tmp_path, *arguments, "--json", uri=door.url)
        printed: Any = json.loads(ended.stdout)
        assert keys <= set(printed if isinstance(printed, dict) else ()), (arguments, ended.stdout)
        assert ended.returncode == 0, (arguments, ended.stderr)
    tags = client_of(door).get_model_version(name, "1").tags
    assert tags["audit.outcome"] == "pass"
    assert tags["audit.subject"] == f"{name}/1"
