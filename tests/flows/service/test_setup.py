"""Deployments, pools and automations on a real, empty Prefect server."""

from __future__ import annotations

import asyncio
import importlib
import time
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import yaml

from audits.errors import SettingsError
from flows.service.automations import HEARTBEAT, NOTIFY, PENDING, RESCHEDULE
from flows.service.pools import QUEUES
from flows.service.setup import SetupOptions, deployments_file, set_up, shipped_file
from tests.servers import plan_for, prefect_server

DEPLOYMENTS = {"nightly-audit/nightly", "audit-versions/nightly", "audit-versions/on-registration"}


def test_every_deployment_fits_its_flow() -> None:
    names = set()
    for deployment in yaml.safe_load(shipped_file().read_text())["deployments"]:
        module, _, function = deployment["entrypoint"].rpartition(".")
        flow = getattr(importlib.import_module(module), function)
        names.add(f"{flow.name}/{deployment['name']}")
        assert deployment["enforce_parameter_schema"] is True
        assert deployment["work_pool"]["work_queue_name"] in QUEUES[deployment["work_pool"]["name"]]
        asked = [deployment.get("parameters") or {}, *(t["parameters"] for t in deployment.get("triggers") or ())]
        for parameters in asked:
            assert set(parameters) <= set(flow.parameters.properties)
    assert names == DEPLOYMENTS


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"cron": "every night"}, "--cron / --timezone: 'every night'"),
        ({"timezone": "Mars/Olympus"}, "'Mars/Olympus'"),
        ({"file": Path("/nowhere/prefect.yaml")}, "--file: /nowhere/prefect.yaml"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_done(options: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        deployments_file(SetupOptions(**options))


def test_no_server_is_refused_with_the_cure() -> None:
    with pytest.raises(SettingsError, match=r"PREFECT_API_URL.*gradaudit up"):
        set_up(SetupOptions())


@pytest.mark.end_to_end
def test_an_empty_server_gets_everything_and_a_full_one_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.blocks.notifications import CustomWebhookNotificationBlock
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with prefect_server(plan_for(tmp_path)) as api, temporary_settings({PREFECT_API_URL: api}):
        monkeypatch.setenv("PREFECT_API_URL", api)  # for `prefect deploy`, a process of its own
        with pytest.raises(SettingsError, match="--notify: Prefect has no block 'custom-webhook/team'"):
            set_up(SetupOptions(notify="custom-webhook/team"))
        with get_client(sync_client=True) as client, pytest.raises(ObjectNotFound):
            client.read_work_pool("gpu")  # refused before anything was made

        first = set_up(SetupOptions(cron="0 3 * * *", timezone="Europe/Berlin"))
        assert {line.removeprefix("deployment ") for line in first if line.startswith("deployment ")} == DEPLOYMENTS
        began = time.monotonic()
        with get_client(sync_client=True) as client:
            while not (scheduled := client.read_flow_runs()):
                assert time.monotonic() - began < 30, "the nightly has no scheduled runs"
                time.sleep(0.5)
            assert {run.name for run in scheduled}
            assert all(run.state is not None and run.state.is_scheduled() for run in scheduled)
            hours = {run.expected_start_time.astimezone(ZoneInfo("Europe/Berlin")).hour for run in scheduled}
            assert hours == {3}
            registration = client.read_deployment_by_name("audit-versions/on-registration")
            with pytest.raises(PrefectHTTPStatusError, match="409"):
                client.create_flow_run_from_deployment(registration.id, parameters={"version": "models:/a/1"})

        block = CustomWebhookNotificationBlock(name="team", url="http://127.0.0.1:9/")
        asyncio.run(_save(block, "team"))
        again = set_up(SetupOptions(notify="custom-webhook/team"))
        assert not [line for line in again if line.endswith(", new") and NOTIFY not in line], again
        assert asyncio.run(_automations()) == sorted([HEARTBEAT, PENDING, RESCHEDULE, NOTIFY, EVENTS])
        assert asyncio.run(_priorities()) == {"registration": 1, "nightly": 10}
        set_up(SetupOptions(notify="none"))
        assert NOTIFY not in asyncio.run(_automations())


EVENTS = "gradaudit audits versions of mlflow.model-version.created"


async def _save(block: Any, name: str) -> None:
    from prefect.client.orchestration import get_client

    async with get_client():
        await type(block).register_type_and_schema()
        await block.save(name)


async def _automations() -> list[str]:
    from prefect.client.orchestration import get_client

    async with get_client() as client:
        return sorted(automation.name for automation in await client.read_automations())


async def _priorities() -> dict[str, int]:
    from prefect.client.orchestration import get_client

    async with get_client() as client:
        queues = await client.read_work_queues(work_pool_name="gpu")
        return {queue.name: queue.priority for queue in queues if queue.name in QUEUES["gpu"]}
