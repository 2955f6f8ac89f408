"""What the automations do on a real Prefect server: runs killed, runs never started, events of a team's own."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from flows.service import automations
from flows.service.plan import Plan
from flows.service.setup import SetupOptions, set_up
from tests.servers import plan_for, prefect_server

#: A run beats at its start and every 30 s from then on, which Prefect allows no less of.
SECONDS = 45

#: A run of a deployment in a process of its own, as a worker starts it; it sleeps.
RUN = """
import sys, time
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow

@flow(name=sys.argv[1])
def sleeping(seconds: float) -> None:
    print("at work", flush=True)
    time.sleep(seconds)

with get_client(sync_client=True) as client:
    run = client.read_flow_run(sys.argv[2])
run_flow(sleeping, flow_run=run, parameters={"seconds": float(sys.argv[3])})
"""


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plan]:
    """Prefect's server with gradaudit set up, its automations quicker than they are."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    plan = plan_for(tmp_path_factory.mktemp("automations"))
    with prefect_server(plan) as api, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_API_URL", api)  # for `prefect deploy`, a process of its own
        patch.setattr(automations, "HEARTBEAT_SECONDS", SECONDS)
        patch.setattr(automations, "PENDING_SECONDS", 10)  # the least that Prefect takes
        with temporary_settings({PREFECT_API_URL: api}):
            set_up(SetupOptions(event_trigger=True))
            yield plan


def started(plan: Plan, name: str, seconds: float, *tags: str) -> subprocess.Popen[str]:
    """Start a run in a process of its own; return once it is at work."""
    run = asyncio.run(_run(name, list(tags)))
    command = [sys.executable, "-c", RUN, name, str(run), str(seconds)]
    environment = {**plan.environment(), "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    return process


def runs(plan: Plan, flow: str) -> list[dict[str, Any]]:
    body = {"flows": {"name": {"any_": [flow]}}}
    answer = httpx.post(f"{plan.prefect_url}/api/flow_runs/filter", json=body, timeout=30)
    found: list[dict[str, Any]] = answer.raise_for_status().json()
    return found


def state(plan: Plan, flow: str) -> str:
    (run,) = runs(plan, flow)
    return str(run["state_name"])


def wait(what: str, holds: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.5)


@pytest.mark.exhaustive
@pytest.mark.end_to_end
def test_killed_runs_are_crashed_and_started_again_and_living_ones_left_alone(plan: Plan) -> None:
    again = started(plan, "again", 600, "gradaudit", "reschedule-when-crashed")
    once = started(plan, "once", 600, "gradaudit")
    foreign = started(plan, "foreign", 600)
    living = started(plan, "living", SECONDS + 20, "gradaudit", "reschedule-when-crashed")
    try:
        time.sleep(5)  # the first beat has been sent
        for process in (again, once, foreign):
            os.kill(process.pid, signal.SIGKILL)
        wait("the killed run is started again", lambda: state(plan, "again") == "AwaitingRetry", 3 * SECONDS)
        wait("the killed run has crashed", lambda: state(plan, "once") == "Crashed", SECONDS)
        assert state(plan, "foreign") == "Running", "another team's run is none of ours"
        assert living.wait(3 * SECONDS) == 0
        assert state(plan, "living") == "Completed"
    finally:
        for process in (again, once, foreign, living):
            process.kill()
            process.wait()


@pytest.mark.exhaustive
@pytest.mark.end_to_end
def test_a_run_that_was_taken_and_never_started_is_handed_out_again(plan: Plan) -> None:
    for name, tags in (("taken", ["gradaudit"]), ("taken-foreign", [])):
        asyncio.run(_run(name, tags, pending=True))
    wait("it is handed out again", lambda: state(plan, "taken") == "AwaitingRetry", 60)
    assert state(plan, "taken-foreign") == "Pending"


@pytest.mark.exhaustive
@pytest.mark.end_to_end
def test_an_event_of_ones_own_has_its_version_audited(plan: Plan) -> None:
    event = {
        "event": "mlflow.model-version.created",
        "resource": {"prefect.resource.id": "mlflow.model-version.digits.7"},
        "payload": {"name": "digits", "version": "7"},
        "occurred": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "id": str(uuid.uuid4()),
    }
    httpx.post(f"{plan.prefect_url}/api/events", json=[event], timeout=30).raise_for_status()
    wait("a run is created", lambda: runs(plan, "audit-versions"), 60)
    (run,) = runs(plan, "audit-versions")
    assert run["parameters"] == {"versions": ["models:/digits/7"], "occasion": "registration"}
    assert run["work_queue_name"] == "registration"


async def _run(name: str, tags: list[str], *, pending: bool = False) -> uuid.UUID:
    """Create a run of a deployment of its own; ``pending``: as after a worker has taken it."""
    from prefect.client.orchestration import get_client
    from prefect.states import Pending

    async with get_client() as client:
        flow = await client.create_flow_from_name(name)
        deployment = await client.create_deployment(flow, name, tags=tags)
        run = await client.create_flow_run_from_deployment(deployment)
        if pending:
            await client.set_flow_run_state(run.id, Pending())
        return run.id
