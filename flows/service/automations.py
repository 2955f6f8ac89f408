"""The automations on the Prefect server: what happens when a flow run falls silent, crashes, or finds a new failure."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from audits.errors import SettingsError
from flows.choosing.notifying import NEWLY_FAILED

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore

#: Seconds without a beat after which a flow run counts as crashed; a run beats every 30 s (`flows.settings`).
HEARTBEAT_SECONDS = 90

#: Seconds between a worker's taking a run and its start, after which it is handed out again: the worker is gone.
PENDING_SECONDS = 180

#: Starts of one run altogether: what crashes again and again is a person's to look at.
STARTS = 3

HEARTBEAT = "gradaudit: a run without heartbeat has crashed"
PENDING = "gradaudit: a run that never started is handed out again"
RESCHEDULE = "gradaudit: a crashed run is started again"
NOTIFY = "gradaudit: tell of newly failed versions"

#: What follows a run's heartbeat when all is well: the next one, or its end under whatever name. Not `Running`: it
#: comes just after the first beat, would count as the next, and a run that dies in its first half minute be missed.
_ENDS = ("Completed", "CompletedWithFailures", "Failed", "Crashed", "Cancelled", "Cancelling", "TimedOut")
_PAUSES = ("AwaitingRetry", "Paused", "Suspended", "Scheduled", "AwaitingConcurrencySlot")

_SUBJECT = "gradaudit: {{ event.payload.model }} v{{ event.payload.version }} fails"
_BODY = """\
{{ event.payload.model }} v{{ event.payload.version }} fails: {{ event.payload.cause | default('see the report') }} \
({{ event.payload.checks | default('its audit') }}).
{{ event.payload.finding | default('') }}
{{ event.payload.link | default('') }}"""


def heartbeat_automation() -> AutomationCore:
    """Return the automation that marks a run ``Crashed`` 90 s after its last heartbeat.

    A worker that is ended, its host lost, leaves its run ``Running`` for ever otherwise.
    """
    from prefect.client.schemas.objects import StateType
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    return AutomationCore(
        name=HEARTBEAT,
        description=f"No heartbeat for {HEARTBEAT_SECONDS} s: its process, worker or host is gone.",
        trigger=EventTrigger(
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related=_ours("gradaudit"),
            for_each={"prefect.resource.id"},
            after={"prefect.flow-run.heartbeat"},
            expect={f"prefect.flow-run.{name}" for name in ("heartbeat", *_ENDS, *_PAUSES)},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=HEARTBEAT_SECONDS),
        ),
        actions=[_change(StateType.CRASHED, None, f"no heartbeat for {HEARTBEAT_SECONDS} s")],
    )


def pending_automation() -> AutomationCore:
    """Return the automation for a run that a worker took and never started: it has no heartbeat yet that could stop."""
    from prefect.client.schemas.objects import StateType
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    return AutomationCore(
        name=PENDING,
        description=f"Pending for {PENDING_SECONDS} s: the worker that took it is gone.",
        trigger=EventTrigger(
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related=_ours("gradaudit"),
            for_each={"prefect.resource.id"},
            after={"prefect.flow-run.Pending"},
            expect={f"prefect.flow-run.{name}" for name in ("Running", "Retrying", *_ENDS, *_PAUSES)},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=PENDING_SECONDS),
        ),
        actions=[_change(StateType.SCHEDULED, "AwaitingRetry", "it never started")],
    )


def reschedule_automation() -> AutomationCore:
    """Return the automation that starts a crashed run again, `STARTS` times altogether.

    Only runs whose deployment says so by a tag: a night's list is run again by the sweep that waits for it.
    """
    from prefect.client.schemas.objects import StateType
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    return AutomationCore(
        name=RESCHEDULE,
        description="Runs of deployments with the tag reschedule-when-crashed; what is committed is not audited again.",
        trigger=EventTrigger(
            match={
                "prefect.resource.id": "prefect.flow-run.*",
                "prefect.run-count": [str(count) for count in range(1, STARTS)],
            },
            match_related=_ours("reschedule-when-crashed"),
            expect={"prefect.flow-run.Crashed"},
            for_each={"prefect.resource.id"},
            posture=Posture.Reactive,
            threshold=1,
            within=timedelta(0),
        ),
        actions=[_change(StateType.SCHEDULED, "AwaitingRetry", "started again")],
    )


def notify_automation(block_id: UUID) -> AutomationCore:
    """Return the automation that sends each newly failed version to a notification block."""
    from prefect.events.actions import SendNotification
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    return AutomationCore(
        name=NOTIFY,
        description="Model, version, finding and link; once per new failure, not for a repeated one.",
        trigger=EventTrigger(
            match={"prefect.resource.id": "gradaudit.version.*"},
            expect={NEWLY_FAILED},
            posture=Posture.Reactive,
            threshold=1,
            within=timedelta(0),
        ),
        actions=[SendNotification(block_document_id=block_id, subject=_SUBJECT, body=_BODY)],
    )


async def keep_automations(client: PrefectClient, notify: str | None) -> list[str]:
    """Create or correct the automations; one line each.

    Args:
        client: the Prefect server's.
        notify: ``BLOCK_TYPE/BLOCK_NAME``; ``none`` removes the notification; None leaves it as it is.

    Raises:
        SettingsError: no such block.
    """
    automations = [heartbeat_automation(), pending_automation(), reschedule_automation()]
    if notify and notify != "none":
        automations.append(notify_automation(await notification_block(client, notify)))
    lines = []
    for automation in automations:
        known = await client.read_automations_by_name(automation.name)
        for double in known[1:]:
            await client.delete_automation(double.id)
        if known:
            await client.update_automation(known[0].id, automation)
        else:
            await client.create_automation(automation)
        lines.append(f"automation {automation.name}{'' if known else ', new'}")
    if notify == "none":
        for known_one in await client.read_automations_by_name(NOTIFY):
            await client.delete_automation(known_one.id)
            lines.append(f"automation {NOTIFY}, removed")
    return lines


async def notification_block(client: PrefectClient, reference: str) -> UUID:
    """Return the id of the block that ``BLOCK_TYPE/BLOCK_NAME`` names (any, for ``none``: nothing is looked up).

    Raises:
        SettingsError: the reference has another form, or there is no such block.
    """
    from uuid import UUID

    from prefect.exceptions import ObjectNotFound

    if reference == "none":
        return UUID(int=0)
    kind, slash, name = reference.partition("/")
    if not (kind and slash and name):
        raise SettingsError(f"--notify: {reference!r} is not BLOCK_TYPE/BLOCK_NAME, such as slack-webhook/team")
    try:
        block = await client.read_block_document_by_name(name, block_type_slug=kind)
    except ObjectNotFound as error:
        raise SettingsError(
            f"--notify: Prefect has no block {reference!r}; make it in its UI under Blocks, or from Python, for "
            "instance prefect.blocks.notifications.SlackWebhook(url=...).save('team')"
        ) from error
    return block.id


def _change(state: StateType, name: str | None, message: str) -> ChangeFlowRunState:
    from prefect.events.actions import ChangeFlowRunState

    return ChangeFlowRunState(state=state, name=name, message=message, force=False)


def _ours(tag: str) -> dict[str, str | list[str]]:
    """Match the runs that carry a tag: another team's flows on the same server stay untouched."""
    return {"prefect.resource.id": f"prefect.tag.{tag}", "prefect.resource.role": "tag"}
