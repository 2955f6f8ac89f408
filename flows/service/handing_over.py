"""Versions handed to Prefect: one flow run at a time for each, a new attempt when the last one failed, then a rest.

What has been handed over stands in Prefect, not in this process: every attempt has an idempotency key of its own, made
of the version as it is (its source, recipe and settings) and the attempt's number. So a webhook delivered three times,
a reconciling loop beside it and a second process all come to one flow run; and since a key whose run died would give
that dead run for ever, the next attempt has the next number.
"""

from __future__ import annotations

import datetime
import enum
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import httpx

from audits.errors import InfrastructureError
from flows.choosing.due_keys import digest
from flows.choosing.sweeping import REGISTRATION
from flows.service.setup import configured_api
from registry_models.registry.versions import Version

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

#: The deployment that audits a version as soon as it is registered.
DEPLOYMENT = "audit-versions/on-registration"

#: Attempts at one version as it is; afterwards the nightly sweep is left to try.
ATTEMPTS = 6

#: Seconds of rest after the first failed attempt, doubled after each further one.
FIRST_REST = 60.0

#: Flow runs of this deployment that wait or run at a time: a bulk import does not flood the server.
LIVE = 50

#: Seconds that Prefect may take for one answer: MLflow waits 30 for ours.
TIMEOUT = 8.0

#: Versions asked about in one request; Prefect's pages hold 200 runs.
_AT_ONCE = 200 // ATTEMPTS


class Handover(enum.StrEnum):
    """What became of a version."""

    NOW = "handed over"
    UNDER_WAY = "a flow run is at it"
    RESTING = "its last flow run failed; the next attempt waits"
    GIVEN_UP = "all attempts failed; it is left to the nightly sweep"
    ELSEWHERE = "its flow run ended without a result here; do its worker and this process have the same settings?"
    FULL = "enough flow runs wait already; it is handed over when some have ended"


def hand_over(wanted: Sequence[tuple[Version, str]], *, now: datetime.datetime | None = None) -> list[Handover]:
    """Have Prefect audit versions, each unless a flow run is at it.

    Args:
        wanted: versions with their due keys.
        now: the present; the clock's otherwise.

    Returns:
        What became of each, in order. After `Handover.NOW` the work is durably Prefect's.

    Raises:
        InfrastructureError: Prefect does not answer, or has no such deployment.
        SettingsError: no Prefect server is configured.
    """
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound, PrefectException

    configured_api()
    now = now or datetime.datetime.now(datetime.UTC)
    results: list[Handover] = []
    try:
        with get_client(sync_client=True, httpx_settings={"timeout": TIMEOUT}) as client:
            deployment = client.read_deployment_by_name(DEPLOYMENT)
            room = LIVE - _live(client, deployment.id) if wanted else 0
            for start in range(0, len(wanted), _AT_ONCE):
                part = wanted[start : start + _AT_ONCE]
                if start and room <= 0:  # nothing of the rest could be handed over: Prefect is not asked about it
                    return results + [Handover.FULL] * (len(wanted) - start)
                runs = _runs(client, [_key(*one, attempt) for one in part for attempt in range(1, ATTEMPTS + 1)])
                for version, due_key in part:
                    attempt, state = _next_attempt(version, due_key, runs, now)
                    if state is Handover.NOW and room <= 0:
                        state = Handover.FULL
                    if state is Handover.NOW:
                        room -= 1
                        client.create_flow_run_from_deployment(
                            deployment.id,
                            parameters={"versions": [version.uri], "occasion": REGISTRATION},
                            idempotency_key=_key(version, due_key, attempt),
                            name=f"{version.label}, attempt {attempt}" if attempt > 1 else version.label,
                        )
                    results.append(state)
    except ObjectNotFound as error:
        raise InfrastructureError(f"Prefect has no deployment {DEPLOYMENT}: run `gradaudit setup`") from error
    except (httpx.HTTPError, PrefectException, OSError, RuntimeError) as error:
        raise InfrastructureError(f"Prefect does not answer: {type(error).__name__}: {error}") from error
    return results


def prefect_answers() -> bool:
    """Whether the Prefect server answers."""
    from prefect.client.orchestration import get_client

    try:
        with get_client(sync_client=True, httpx_settings={"timeout": TIMEOUT}) as client:
            return client.api_healthcheck() is None
    except (httpx.HTTPError, OSError, RuntimeError):
        return False


def _key(version: Version, due_key: str, attempt: int) -> str:
    """The version as it is and the attempt; hashed, for names may be long and hold anything."""
    return f"gradaudit-{digest(version.name, version.version, due_key)}-attempt{attempt}"


def _live(client: SyncPrefectClient, deployment: UUID) -> int:
    """Return how many of the deployment's flow runs wait or run, at most one page of them."""
    from prefect.client.schemas import filters
    from prefect.client.schemas.objects import TERMINAL_STATES, StateType

    types = [kind for kind in StateType if kind not in TERMINAL_STATES]
    state = filters.FlowRunFilterState(type=filters.FlowRunFilterStateType(any_=types))
    ours = filters.DeploymentFilter(id=filters.DeploymentFilterId(any_=[deployment]))
    wanted = filters.FlowRunFilter(state=state)
    return len(client.read_flow_runs(flow_run_filter=wanted, deployment_filter=ours, limit=LIVE))


def _runs(client: SyncPrefectClient, keys: Iterable[str]) -> dict[str, FlowRun]:
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterIdempotencyKey

    wanted = FlowRunFilter(idempotency_key=FlowRunFilterIdempotencyKey(any_=list(keys)))
    found: dict[str, FlowRun] = {}
    for run in client.read_flow_runs(flow_run_filter=wanted, limit=200):
        if run.idempotency_key:
            found[run.idempotency_key] = run
    return found


def _next_attempt(
    version: Version, due_key: str, runs: dict[str, FlowRun], now: datetime.datetime
) -> tuple[int, Handover]:
    """Return the attempt to make and whether to make it now."""
    for attempt in range(1, ATTEMPTS + 1):
        run = runs.get(_key(version, due_key, attempt))
        if run is None:
            return attempt, Handover.NOW
        if run.state is None or not run.state.is_final():
            return attempt, Handover.UNDER_WAY
        if run.state.is_completed():
            return attempt, Handover.ELSEWHERE  # again would come to the same
        ended = run.end_time or run.state.timestamp
        last = runs.get(_key(version, due_key, attempt + 1)) is None
        if last and attempt < ATTEMPTS and (now - ended).total_seconds() < FIRST_REST * 2 ** (attempt - 1):
            return attempt, Handover.RESTING
    return ATTEMPTS, Handover.GIVEN_UP


def tally(handed: Iterable[Handover]) -> str:
    """Return the counts in words."""
    counts: dict[Handover, int] = defaultdict(int)
    for one in handed:
        counts[one] += 1
    return ", ".join(f"{number} {state}" for state, number in counts.items())
