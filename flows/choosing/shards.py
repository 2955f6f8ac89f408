"""A night's versions cut into flow runs, and the flow runs on the workers: bounded, resumable, none lost silently."""

from __future__ import annotations

import dataclasses
import heapq
import logging
import math
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, cast
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound

from audits.naming import label_of_reference
from audits.wording import listed
from flows.choosing.due import Due
from flows.choosing.due_keys import digest
from flows.settings.environment import GradauditSettings

_log = logging.getLogger(__name__)

#: The deployment that audits a list of versions on a worker.
DEPLOYMENT = "audit-versions/nightly"

#: Flow runs that one shard may have in one night: a failed one is repeated once, on whatever worker is free.
TRIES = 2

#: Seconds of audits below which a shard is not worth the start of another flow run.
SMALLEST_SHARD = 60.0

#: Seconds without a running or starting flow run after which a night stops waiting for workers.
PATIENCE = 1800.0

_BEAT = 2.0


@dataclasses.dataclass(frozen=True)
class Shard:
    """Versions that one flow run audits, in order, and what that is expected to take."""

    versions: tuple[str, ...]
    seconds: float

    @property
    def label(self) -> str:
        """The first version and how many follow."""
        return listed(map(label_of_reference, self.versions), 1)

    @property
    def identity(self) -> str:
        """The same for the same versions, so that a repeated night finds the flow runs of the first."""
        return digest(*self.versions)


def cut(due: Sequence[Due], settings: GradauditSettings) -> list[Shard]:
    """Cut a night into shards of about equal cost: the longest audits are dealt first, each to the lightest shard.

    Args:
        due: the night's versions, in order; a shard keeps that order.
        settings: ``shard_minutes`` and ``shards_at_once``.
    """
    if not due:
        return []
    total = sum(d.seconds for d in due)
    long_enough = math.ceil(total / (settings.shard_minutes * 60))
    number = min(len(due), max(long_enough, min(settings.shards_at_once, int(total // SMALLEST_SHARD)), 1))
    loads = [(0.0, index) for index in range(number)]
    members: list[list[int]] = [[] for _ in range(number)]
    for position in sorted(range(len(due)), key=lambda position: (-due[position].seconds, position)):
        load, index = heapq.heappop(loads)
        members[index].append(position)
        heapq.heappush(loads, (load + due[position].seconds, index))
    return [
        Shard(tuple(due[p].version.uri for p in sorted(taken)), sum(due[p].seconds for p in taken)) for taken in members
    ]


def workers_wait() -> bool:
    """Whether there is a deployment for shards, and a worker online for its pool."""
    with get_client(sync_client=True) as client:
        try:
            deployment = client.read_deployment_by_name(DEPLOYMENT)
        except ObjectNotFound:
            return False
        if not deployment.work_pool_name:
            return False
        workers = client.read_workers_for_work_pool(deployment.work_pool_name)
    if any(str(worker.status).endswith("ONLINE") for worker in workers):
        return True
    _log.warning("no worker is online for the pool %r: the night is audited here", deployment.work_pool_name)
    return False


def run_on_workers(
    shards: Sequence[Shard],
    *,
    occasion: str,
    chosen_at: datetime | None,
    at_once: int,
    on_beat: Callable[[], None] = lambda: None,
    patience: float = PATIENCE,
) -> list[str]:
    """Run the shards on the workers and return what went wrong, a sentence per shard that could not be done.

    Args:
        shards: what to run.
        occasion: the night.
        chosen_at: when the versions were chosen; None repeats what others have done since.
        at_once: flow runs in flight at a time.
        on_beat: called every few seconds.
        patience: seconds to wait while no worker takes up anything.
    """
    waiting = [_Run(shard) for shard in reversed(shards)]
    flying: list[_Run] = []
    troubles: list[str] = []
    alive = time.monotonic()
    with get_client(sync_client=True) as client:
        while waiting or flying:
            while waiting and len(flying) < at_once:
                run = waiting.pop()
                run.start(occasion, chosen_at)
                flying.append(run)
            time.sleep(_BEAT)
            for run in list(flying):
                state = client.read_flow_run(cast("UUID", run.flow_run)).state
                if state is None or not state.is_final():
                    alive = time.monotonic() if state is not None and _moves(state) else alive
                    continue
                alive = time.monotonic()
                flying.remove(run)
                if not state.is_completed() and run.tries < TRIES:
                    waiting.append(run)
                elif not state.is_completed():
                    troubles.append(f"{state.name}: {state.message or 'no reason given'}")
            on_beat()
            if time.monotonic() - alive > patience:
                troubles += [f"no worker took up {run.shard.label}" for run in flying]
                _cancel(client, flying)
                return troubles
    return troubles


@dataclasses.dataclass
class _Run:
    shard: Shard
    tries: int = 0
    flow_run: UUID | None = None

    def start(self, occasion: str, chosen_at: datetime | None) -> None:
        """Hand the shard to the workers; the same shard of the same night is handed over once per try."""
        self.tries += 1
        parameters: dict[str, Any] = {
            "versions": list(self.shard.versions),
            "occasion": occasion,
            "chosen_at": chosen_at and chosen_at.isoformat(),
        }
        run: Any = run_deployment(
            DEPLOYMENT,
            parameters=parameters,
            timeout=0,
            idempotency_key=f"{occasion}-{self.shard.identity}-attempt{self.tries}",
            flow_run_name=f"{occasion}: {self.shard.label}",
        )
        self.flow_run = run.id


def _moves(state: Any) -> bool:
    return bool(state.is_running() or state.is_pending())


def _cancel(client: SyncPrefectClient, runs: Sequence[_Run]) -> None:
    from prefect.states import Cancelled

    for run in runs:
        client.set_flow_run_state(
            cast("UUID", run.flow_run), Cancelled(message="no worker took it up tonight"), force=True
        )
