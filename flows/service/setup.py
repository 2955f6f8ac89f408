"""``gradaudit setup``: pools, queues, deployments and automations on a Prefect server; repeat at will."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import yaml

from audits.errors import InfrastructureError, SettingsError
from flows.processes import PYTHON
from flows.service.automations import keep_automations, notification_block
from flows.service.pools import QUEUES

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient


@dataclasses.dataclass(frozen=True)
class SetupOptions:
    """What a team may choose.

    Attributes:
        cron: when the nightly starts; the file's schedule when not given.
        timezone: the schedule's time zone, such as ``Europe/Berlin``.
        notify: ``BLOCK_TYPE/BLOCK_NAME`` of a notification block that is told of newly failed versions; ``none`` takes
            the notification away; None leaves it as it is.
        event_trigger: audit what the event ``mlflow.model-version.created`` names.
        file: the deployments; those that gradaudit ships when not given.
        pool_type: type of work pools that do not exist yet: ``process``, ``docker``, ``kubernetes``.
    """

    cron: str | None = None
    timezone: str | None = None
    notify: str | None = None
    event_trigger: bool = False
    file: Path | None = None
    pool_type: str = "process"


def set_up(options: SetupOptions) -> list[str]:
    """Create or correct everything gradaudit needs on the configured Prefect server; return one line per thing done.

    Raises:
        InfrastructureError: no server is configured, or it does not answer.
        SettingsError: a schedule, block or file that cannot be.
    """
    api = configured_api()
    described = deployments_file(options)
    try:
        lines = asyncio.run(_set_up_pools(options))
        lines += [f"deployment {name}" for name in _deploy(described)]
        return [*lines, *asyncio.run(_set_up_automations(options))]
    except httpx.HTTPError as error:
        raise InfrastructureError(f"Prefect at {api} does not answer as it should: {error}") from error


def configured_api() -> str:
    """Return the API URL of the configured Prefect server.

    Raises:
        SettingsError: there is none: what an embedded server is told is gone with it.
    """
    from prefect.settings import get_current_settings

    url = get_current_settings().api.url
    if not url:
        raise SettingsError(
            "PREFECT_API_URL: no Prefect server is configured; set it, for instance to http://127.0.0.1:4200/api, "
            "or start everything on this machine with `gradaudit up`"
        )
    return str(url)


def shipped_file() -> Path:
    """Return the ``prefect.yaml`` that belongs to this installation: in the checkout, or inside the wheel."""
    inside = Path(__file__).resolve().parents[1] / "prefect.yaml"
    return inside if inside.is_file() else inside.parents[1] / "prefect.yaml"


def deployments_file(options: SetupOptions) -> dict[str, Any]:
    """Return the described deployments with the options applied.

    Raises:
        SettingsError: no such file, no deployments in it, or no schedule where one is to be changed.
    """
    path = options.file or shipped_file()
    try:
        described = yaml.safe_load(path.read_text(encoding="utf-8"))
        deployments = list(described["deployments"])
    except (OSError, yaml.YAMLError, TypeError, KeyError) as error:
        raise SettingsError(f"--file: {path} describes no deployments: {error}") from error
    if options.cron or options.timezone:
        schedules = [schedule for d in deployments for schedule in d.get("schedules") or () if "cron" in schedule]
        if not schedules:
            raise SettingsError(f"--cron: no deployment in {path} has a cron schedule")
        for schedule in schedules:
            schedule.update({"cron": options.cron or schedule["cron"]})
            schedule.update({"timezone": options.timezone or schedule.get("timezone", "UTC")})
            _check_schedule(schedule)
    if options.event_trigger:
        for trigger in [trigger for d in deployments for trigger in d.get("triggers") or ()]:
            trigger["enabled"] = True
    return dict(described)


def _check_schedule(schedule: dict[str, str]) -> None:
    from prefect.client.schemas.schedules import CronSchedule

    try:
        CronSchedule(cron=schedule["cron"], timezone=schedule["timezone"])
    except ValueError as error:
        raise SettingsError(
            f"--cron / --timezone: {schedule['cron']!r} in {schedule['timezone']!r}: {error}"
        ) from error


async def _set_up_pools(options: SetupOptions) -> list[str]:
    from prefect.client.orchestration import get_client

    lines = []
    async with get_client() as client:
        if options.notify:
            await notification_block(client, options.notify)  # refused before anything is changed
        for pool, queues in QUEUES.items():
            lines.append(await _keep_pool(client, pool, options.pool_type))
            for queue, priority in queues.items():
                lines.append(await _keep_queue(client, pool, queue, priority))
    return lines


async def _keep_pool(client: PrefectClient, name: str, kind: str) -> str:
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists
    from prefect.workers.utilities import get_default_base_job_template_for_infrastructure_type

    template = await get_default_base_job_template_for_infrastructure_type(kind)
    if template is None:
        raise SettingsError(f"--pool-type: no worker of type {kind!r} is installed, such as `prefect-{kind}`")
    try:
        await client.create_work_pool(WorkPoolCreate(name=name, type=kind, base_job_template=template))
    except ObjectAlreadyExists:
        pool = await client.read_work_pool(name)  # the team's own: its type and its job template stay as they are
        return f"work pool {name} ({pool.type})"
    return f"work pool {name} ({kind}), new"


async def _keep_queue(client: PrefectClient, pool: str, name: str, priority: int) -> str:
    from prefect.exceptions import ObjectNotFound

    try:
        queue = await client.read_work_queue_by_name(name, work_pool_name=pool)
    except ObjectNotFound:
        await client.create_work_queue(name=name, priority=priority, work_pool_name=pool)
        return f"work queue {pool}/{name}, priority {priority}, new"
    if queue.priority != priority:
        await client.update_work_queue(queue.id, priority=priority)
    return f"work queue {pool}/{name}, priority {priority}"


def _deploy(described: dict[str, Any]) -> list[str]:
    """Prefect's own ``deploy --all``, from a folder that holds nothing but the description; return what it deployed."""
    with tempfile.TemporaryDirectory(prefix="gradaudit-") as folder:
        file = Path(folder) / "prefect.yaml"
        file.write_text(yaml.safe_dump(described, sort_keys=False), encoding="utf-8")
        command = [*PYTHON, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file)]
        done = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    if done.returncode:
        words = " ".join(done.stdout.split())
        raise InfrastructureError(f"`prefect deploy --all` did not succeed: ...{words[-600:]}")
    return re.findall(r"Deployment\s+'(\S+)'", done.stdout)


async def _set_up_automations(options: SetupOptions) -> list[str]:
    from prefect.client.orchestration import get_client

    async with get_client() as client:
        return await keep_automations(client, options.notify)
