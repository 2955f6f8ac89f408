"""A real MLflow server as a company has it: basic authentication, a path prefix, artifacts through the server."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.tracking import MlflowClient

from tests.flows.cli.test_audit_command import gradaudit as in_process
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


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process: exit code, stdout, stderr."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")

    def command(*arguments: str, uri: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = in_process(*arguments, "--tracking-uri", uri, monkeypatch=monkeypatch, tmp_path=tmp_path)
        return (code, *capsys.readouterr())

    return command


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


@pytest.mark.exhaustive
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


@pytest.mark.parametrize(
    ("user", "place", "words"),
    [
        (None, "{}", "asks for a login (401): set MLFLOW_TRACKING_USERNAME"),
        ("stranger", "{}", "refuses the login of 'stranger' (401): check MLFLOW_TRACKING_PASSWORD"),
        ("writer", "{}/nowhere", "no MLflow at that address (404): is the tracking URI's path prefix"),
        ("writer", "{}x", "no MLflow at that address (404)"),
    ],
)
def test_what_is_in_the_way_is_said_with_its_cure(
    door: Door, run: Run, monkeypatch: pytest.MonkeyPatch, user: str | None, place: str, words: str
) -> None:
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name)
    if user:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", USERS.get(user, "guess"))
    code, out, err = run("audit", "models:/m/1", "--json", uri=place.format(door.url))
    assert (code, out) == (2, "")
    assert words in err
    assert "repeat" not in err
    assert "Traceback" not in err


def test_a_verdict_outlives_a_missing_right(
    door: Door, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_linear("kept")
    for name, value in logged_in("reader").items():
        monkeypatch.setenv(name, value)
    code, out, err = run("audit", "models:/kept/1", "--json", uri=door.url)
    printed = json.loads(out)
    assert (code, printed["outcome"], printed["run_id"]) == (0, "pass", None)
    for told in (printed["not_published"], err):
        assert "forbids it (403): the user 'reader' needs the right to create" in told
        assert "--no-mark" in told
    assert list((tmp_path / "results" / "rows").rglob("part-*")) == [], "no rows without their audit"
    assert "audit.outcome" not in client_of(door).get_model_version("kept", "1").tags
    code, out, err = run("audit", "models:/kept/1", "--json", "--no-mark", uri=door.url)
    assert (code, json.loads(out)["outcome"], "not_published" in json.loads(out)) == (0, "pass", False)


def test_a_verdict_outlives_a_server_that_dies(door: Door, run: Run, tmp_path: Path) -> None:
    register_linear("late")
    door.broken, door.status = re.compile("POST .*/mlflow/runs/create"), 500
    code, out, _ = run("audit", "models:/late/1", "--json", uri=door.url)
    printed = json.loads(out)
    assert (code, printed["outcome"]) == (0, "pass")
    assert "MLflow could not answer for the audit's run" in printed["not_published"]
    assert "--no-mark" not in printed["not_published"], "waiting helps"
    assert list((tmp_path / "results" / "rows").rglob("part-*")) == []


def test_a_night_goes_on_past_one_version(door: Door, tmp_path: Path) -> None:
    for name in ("night-a", "night-b", "night-c"):
        register_linear(name)
    client = client_of(door)
    ids = {name: client.get_model_version(name, "1").source.removeprefix("models:/") for name in ("night-a", "night-b")}
    door.broken, door.status = re.compile(f"GET .*mlflow-artifacts/artifacts.*{ids['night-b']}"), 403
    ended = gradaudit(tmp_path, "nightly", "--models", "night-*", "--json", uri=door.url)
    printed = json.loads(ended.stdout)
    told = {summary["model"]: summary for summary in printed["audited"]}
    assert {name: summary["outcome"] for name, summary in told.items()} == {
        "night-a": "pass", "night-b": "inconclusive", "night-c": "pass",
    }  # fmt: skip
    assert "403" in told["night-b"]["headline"]
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    door.broken = None
    ended = gradaudit(tmp_path, "nightly", "--models", "night-*", "--json", uri=door.url)
    (again,) = json.loads(ended.stdout)["audited"]
    assert (again["model"], again["outcome"]) == ("night-b", "pass"), "it stays due until its files can be had"
    assert ended.returncode == 0


def test_missing_files_are_the_versions_own_matter(door: Door, run: Run) -> None:
    register_linear("gone")
    door.broken, door.status = re.compile("GET .*mlflow-artifacts/artifacts"), 404
    code, out, _ = run("audit", "models:/gone/1", "--json", uri=door.url)
    assert code == 2
    assert json.loads(out)["outcome"] == "inconclusive"
    assert "has no such files (404)" in json.loads(out)["headline"]
