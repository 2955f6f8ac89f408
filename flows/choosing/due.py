"""What a night is to audit: what its owners changed, then a sample and a share of what only aged. Knows no Prefect.

Two keys are kept apart. The *due key* is what a version's owner can change: its source, its recipe, the settings. A
version without a committed audit under its present due key is due tonight. The *environment* (gradaudit, torch, device,
driver) changes for the whole fleet at once; auditing everything again in one night would be a storm, so a sample of
every kind of artifact and model goes first, and the rest follows in its turn.
"""

from __future__ import annotations

import dataclasses
import datetime
import enum
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache

from mlflow.tracking import MlflowClient

from audits.results.committed import CommittedAudit, CommittedAudits
from audits.results.store import ResultsStore
from audits.settings import AuditSettings
from flows.choosing.due_keys import due_key, environment, trusted_digest
from flows.choosing.outside import SetAside, set_aside
from flows.choosing.recipes_missing import WithoutRecipe, known_without_recipe
from flows.settings.environment import GradauditSettings
from flows.team_policy import waivers_of
from registry_models.registry.versions import Version, list_versions

#: Seconds that an audit is expected to take where nothing is known: a small model's, with its process and its run.
USUAL_SECONDS = 10.0

#: Most versions that a changed environment sends first, beyond the night's ordinary share.
MAXIMUM_SAMPLE = 50


class Reason(enum.StrEnum):
    """Why a version is audited tonight."""

    CHANGED = "never audited as it now is"
    FORCED = "asked for"
    SAMPLE = "as a sample of a changed environment"
    ROTATION = "in their turn"

    @property
    def unchanged(self) -> bool:
        """Whether the version has a result as it now is, and is audited again all the same."""
        return self in (Reason.SAMPLE, Reason.ROTATION)


@dataclasses.dataclass(frozen=True)
class Due:
    """One version of a night.

    Attributes:
        version: the version.
        reason: why.
        seconds: what its audit is expected to take.
    """

    version: Version
    reason: Reason
    seconds: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """A night's work.

    Attributes:
        due: what is audited, in order.
        looked_at: number of versions looked at.
        environment: what the audits run with.
        at: when it was planned.
        outdated: unchanged versions whose latest audit ran in another environment, before tonight.
        known: ids of the audits that were committed when it was planned.
        unready: sentences on versions whose registration has not ended, or has failed: they are passed over.
        outside: versions that are outside the audit.
        without_recipe: versions that could not be judged before tonight since nobody says how they are trained.
    """

    due: tuple[Due, ...]
    looked_at: int
    environment: str
    at: datetime.datetime = dataclasses.field(default_factory=lambda: datetime.datetime.now(datetime.UTC))
    outdated: int = 0
    known: frozenset[str] = frozenset()
    unready: tuple[str, ...] = ()
    outside: tuple[SetAside, ...] = ()
    without_recipe: tuple[WithoutRecipe, ...] = ()

    def is_new(self, audit: CommittedAudit) -> bool:
        """Whether an audit was committed after the planning; it can have ended before, and waited for MLflow."""
        return audit.audit_id not in self.known or audit.audited_at >= self.at

    def count(self, reason: Reason) -> int:
        """Number of versions that are due for this reason."""
        return sum(1 for due in self.due if due.reason is reason)


def plan_night(
    client: MlflowClient,
    settings: GradauditSettings,
    *,
    models: Sequence[str] = (),
    force: bool = False,
    now: datetime.datetime | None = None,
) -> Plan:
    """Choose what to audit tonight.

    Args:
        client: client of the registry.
        settings: results store, rotation.
        models: globs of model names; all without.
        force: audit everything that matches.
        now: the present; the clock's otherwise.

    Raises:
        InfrastructureError: the registry or the results store does not answer.
    """
    now = now or datetime.datetime.now(datetime.UTC)
    found = sorted(list_versions(client, models), key=lambda v: (v.created, v.name, v.version))
    versions, unready = [v for v in found if not v.unready], tuple(v.unready for v in found if v.unready)
    committed = CommittedAudits(ResultsStore(settings.results)).refresh()
    versions, outside = set_aside(versions, client, settings.results, committed=committed)
    expected = _Expected(committed.latest())
    plan = Plan(
        due=(),
        looked_at=len(found),
        environment=environment(settings),
        at=now,
        known=committed.ids,
        unready=unready,
        outside=tuple(outside),
        without_recipe=known_without_recipe(versions, committed),
    )
    if force:
        return dataclasses.replace(plan, due=tuple(Due(v, Reason.FORCED, expected.seconds(v)) for v in versions))
    fresh, due = _Fresh(), []
    for version, key in _keyed(versions, settings):
        audits = [a for a in committed.of(version.name, version.version) if a.due_key == key]
        if audits:
            fresh.add(version, audits)
        else:
            due.append(Due(version, Reason.CHANGED, expected.seconds(version)))
    again = fresh.again(settings, plan.environment, now)
    due += _within(settings.rotation_hours * 3600, [Due(v, why, expected.seconds(v)) for v, why in again])
    return dataclasses.replace(plan, due=tuple(due), outdated=len(fresh.outdated(plan.environment)))


def without_result(versions: Iterable[Version], settings: GradauditSettings) -> list[tuple[Version, str]]:
    """Return, with their due keys, the versions that have no committed audit as they now are.

    Raises:
        InfrastructureError: the results store does not answer.
    """
    committed = _committed(settings.results).refresh()
    return [
        (version, key)
        for version, key in _keyed((v for v in versions if not v.unready), settings)
        if not any(audit.due_key == key for audit in committed.of(version.name, version.version))
    ]


@cache
def _committed(results: str) -> CommittedAudits:
    """One index per store and process: a loop that asks every ten seconds reads only what is new."""
    return CommittedAudits(ResultsStore(results))


class _Fresh:
    """The versions whose owners changed nothing, with their audits under the present due key, oldest first."""

    def __init__(self) -> None:
        self._audits: list[tuple[Version, list[CommittedAudit]]] = []

    def add(self, version: Version, audits: list[CommittedAudit]) -> None:
        self._audits.append((version, audits))

    def outdated(self, present: str) -> list[tuple[Version, CommittedAudit]]:
        return [
            (version, audits[-1]) for version, audits in self._audits if not is_present(audits[-1].environment, present)
        ]

    def again(self, settings: GradauditSettings, present: str, now: datetime.datetime) -> list[tuple[Version, Reason]]:
        """Return what is audited again: a sample of what another environment judged, then the night's share."""
        if not settings.rotation_days:
            return []
        outdated = self.outdated(present)
        sample = self._sample(outdated, present)
        chosen = {version.uri for version in sample}
        # Tonight's share counts what an earlier run of tonight's sweep has already taken its turn.
        share = math.ceil(len(self._audits) / settings.rotation_days)
        done = sum(1 for _, audits in self._audits if len(audits) > 1 and audits[-1].audited_at.date() == now.date())
        left = [
            (version, audits[-1])
            for version, audits in self._audits
            if audits[-1].audited_at.date() < now.date() and version.uri not in chosen
        ]
        left.sort(key=lambda pair: (is_present(pair[1].environment, present), pair[1].audited_at))
        turn = left[: max(0, share - done)]
        return [(v, Reason.SAMPLE) for v in sample] + [(v, Reason.ROTATION) for v, _ in turn]

    def _sample(self, outdated: list[tuple[Version, CommittedAudit]], present: str) -> list[Version]:
        """The newest version of every artifact kind and model that the present environment has not judged yet.

        Kinds take turns, so that a kind with many models does not crowd out the others.
        """
        judged = {(a[-1].artifact_kind, v.name) for v, a in self._audits if is_present(a[-1].environment, present)}
        strata: dict[tuple[str, str], Version] = {}
        for version, audit in outdated:
            stratum = (audit.artifact_kind, version.name)
            if stratum not in judged and version.version > getattr(strata.get(stratum), "version", 0):
                strata[stratum] = version
        kinds: dict[str, list[Version]] = defaultdict(list)
        for (kind, _), version in strata.items():
            kinds[kind].append(version)
        taken = []
        for turn in range(max(map(len, kinds.values()), default=0)):
            taken += [found[turn] for _, found in sorted(kinds.items()) if turn < len(found)]
        return taken[:MAXIMUM_SAMPLE]


class _Expected:
    """What an audit will take, by what audits took."""

    def __init__(self, latest: Iterable[CommittedAudit]) -> None:
        self._own: dict[tuple[str, int], float] = {}
        self._model: dict[str, float] = {}
        for audit in latest:
            self._own[audit.model_name, audit.model_version] = audit.seconds
            self._model[audit.model_name] = max(audit.seconds, self._model.get(audit.model_name, 0.0))

    def seconds(self, version: Version) -> float:
        """Return the version's own past seconds, or its model's worst, besides those around an audit."""
        known = self._own.get((version.name, version.version), self._model.get(version.name))
        return USUAL_SECONDS if known is None else known + USUAL_SECONDS / 2


def _within(budget: float, due: list[Due]) -> list[Due]:
    """Return as many as fit into the budget, in seconds; 0 has no limit, and one always fits."""
    if not budget:
        return due
    taken: list[Due] = []
    seconds = 0.0
    for candidate in due:
        seconds += candidate.seconds
        if taken and seconds > budget:
            break
        taken.append(candidate)
    return taken


def _keyed(versions: Iterable[Version], settings: GradauditSettings) -> Iterable[tuple[Version, str]]:
    waivers = waivers_of(settings)
    models: dict[str, tuple[AuditSettings, str]] = {}
    for version in versions:
        if version.name not in models:
            models[version.name] = settings.for_model(version.name), trusted_digest(settings, version.name)
        audit_settings, trusted = models[version.name]
        yield version, due_key(version, settings, audit_settings, trusted=trusted, waivers=waivers)


def is_present(environment: str, present: str) -> bool:
    """Whether an audit's environment is the present one; asked on a host without a GPU, any driver will do."""
    return environment == present or (", driver " not in present and environment.startswith(f"{present}, driver "))
