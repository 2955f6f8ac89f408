"""Registered through MLflow's REST server, audited and tagged: by its webhook, and by the loop alone."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import mlflow
import pytest
from mlflow.tracking import MlflowClient

from audits.results.store import ResultsStore
from flows.service.plan import Plan
from flows.service.supervising import Service
from tests.servers import log_of, mlflow_server, plan_for, prefect_server, running
from tests.stores import register_linear

#: What is promised, in seconds from registration to mark, with an audit that takes no more than `USUAL`.
PROMISED, USUAL = 60.0, 10.0


@pytest.fixture
def plan(tmp_path: Path) -> Iterator[Plan]:
    """MLflow, Prefect with gradaudit set up, and a worker for registrations."""
    plan = plan_for(tmp_path / "up")
    with contextlib.ExitStack() as stack:
        stack.enter_context(mlflow_server(plan))
        stack.enter_context(prefect_server(plan))
        setup = [sys.executable, "-m", "flows.cli", "setup"]
        done = subprocess.run(setup, env=plan.environment(), cwd=plan.folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        worker = plan.workers()[-1]
        assert worker.command[-1] == "registration"
        stack.enter_context(running(worker, plan))
        mlflow.set_tracking_uri(plan.mlflow_url)
        stack.callback(mlflow.set_tracking_uri, None)
        yield plan


def found(plan: Plan, what: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    answer = httpx.post(f"{plan.prefect_url}/api/{what}/filter", json=body, timeout=30)
    rows: list[dict[str, Any]] = answer.raise_for_status().json()
    return rows


def seconds_to_mark(plan: Plan, name: str, log: Path) -> float:
    """Register a version and return the seconds until it is marked."""
    client = MlflowClient(plan.mlflow_url)
    version = str(register_linear(name))
    created = client.get_model_version(name, version).creation_timestamp / 1000
    deadline = time.monotonic() + 240
    while "audit.outcome" not in (tags := client.get_model_version(name, version).tags):
        assert time.monotonic() < deadline, log.read_text() + str(found(plan, "flow_runs", {}))
        time.sleep(0.2)
    taken = time.time() - created
    assert tags["audit.outcome"] == "pass"
    return float(taken)


def hold_to_the_promise(plan: Plan, name: str, taken: float) -> None:
    deadline = time.monotonic() + 30  # the mark comes just before the commit
    while not (lines := [a for a in ResultsStore(plan.results).read("audits").to_pylist() if a["model_name"] == name]):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    (audit,) = lines
    assert audit["occasion"] == "registration"
    print(f"{name}: {taken:.1f} s from registration to mark, {audit['seconds']:.1f} s of them the audit")
    assert taken < PROMISED + max(0.0, audit["seconds"] - USUAL)


@pytest.mark.exhaustive
@pytest.mark.end_to_end
def test_a_registered_version_is_audited_within_a_minute(plan: Plan) -> None:
    hook = plan.webhook()
    # its loop is left no part in this: what is audited was told by MLflow
    alone = dataclasses.replace(hook, command=[*hook.command, "--interval", "3600"])
    with running(alone, plan, f"{plan.webhook_url}/health") as process:
        deadline = time.monotonic() + 60
        while not MlflowClient(plan.mlflow_url).list_webhooks():
            assert time.monotonic() < deadline, log_of(hook, plan).read_text()
            time.sleep(0.2)
        health = httpx.get(f"{plan.webhook_url}/health", timeout=60).json()
        assert (health["registry"], health["prefect"]) == ("ok", "ok")
        taken = seconds_to_mark(plan, "told", log_of(hook, plan))
        hold_to_the_promise(plan, "told", taken)
        process.terminate()
        assert process.wait(30) == 0, log_of(hook, plan).read_text()

    command = [sys.executable, "-m", "flows.cli", "watch"]
    watch = Service("watch", command, plan.environment())
    with running(watch, plan) as process:
        taken = seconds_to_mark(plan, "looked-for", log_of(watch, plan))
        hold_to_the_promise(plan, "looked-for", taken)
        time.sleep(0.5)
        process.terminate()
        assert process.wait(30) == 0, log_of(watch, plan).read_text()

    runs = [run for run in found(plan, "flow_runs", {}) if "attempt" in (run["idempotency_key"] or "")]
    handed = sorted(run["parameters"]["versions"] for run in runs)
    assert handed == [["models:/looked-for/1"], ["models:/told/1"]], "one flow run each, whoever tells of it"
    (nightly,) = (d for d in found(plan, "deployments", {}) if d["name"] == "nightly" and d["schedules"])
    ours = {"deployments": {"id": {"any_": [nightly["id"]]}}, "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}
    assert found(plan, "flow_runs", ours), "and the nights to come are scheduled"
