"""The way of one audit: snapshot, child, store, publish, mark, commit. Knows no Prefect and no arithmetic."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
import threading
import uuid
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from mlflow.tracking import MlflowClient

from audits.confirming import settled, suspected
from audits.errors import GradauditError, InputError
from audits.report import AuditReport
from audits.run import refused, with_identity
from audits.settings import AuditSettings
from flows.fallback import Way, ran_out, told, ways
from flows.fetching import fetch
from flows.gpu import held
from flows.isolation import limits_of, run_child
from flows.judging import standing_waivers, under_severities, under_waivers
from flows.keeping import keep
from flows.keys import digest, due_key, environment, trusted_digest
from flows.private_folders import private_folder
from flows.rerunning import rerun_of
from flows.sandbox import Level, reached_level
from flows.sandbox.artifact import rewritten, shown
from flows.settings import GradauditSettings
from flows.sweeping import Sweep
from registry_models.answer import clean, read_answer
from registry_models.recipe_files import RECIPE_FILE
from registry_models.snapshot import Snapshot, read_snapshot
from registry_models.versions import Version

_log = logging.getLogger(__name__)

#: The due key of an audit that something else than the version kept from judging: no version has it, so it stays due.
DUE_AGAIN = "again"


@dataclasses.dataclass(frozen=True)
class Target:
    """What to audit and why.

    Attributes:
        version: the registered version.
        occasion: ``registration``, a night's date, or a fresh id; with the fingerprint it makes the audit's id, so a
            retry overwrites its own work and a re-audit keeps history.
    """

    version: Version
    occasion: str


def fresh_occasion() -> str:
    """Return an occasion that no other audit has."""
    return f"manual-{uuid.uuid4().hex[:12]}"


def audit_version(
    target: Target,
    client: MlflowClient,
    settings: GradauditSettings,
    *,
    audit_settings: AuditSettings | None = None,
    write: bool = True,
    recipe: Path | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
    sweep: Sweep | None = None,
) -> AuditReport:
    """Audit one registered version from download to commit.

    Args:
        target: the version and the occasion.
        client: MLflow client of the registry.
        settings: limits, results store, experiment.
        audit_settings: what to check; those in ``settings`` otherwise.
        write: False leaves results, MLflow and the registry untouched (a narrowed audit, ``--no-mark``).
        recipe: a folder with a recipe to use instead of the version's.
        on_stage: called with each stage's name as it begins.
        sweep: what this audit shares with others of its flow run.

    Returns:
        The report. A version that could not be audited has an ``inconclusive`` one with the cause.

    Raises:
        InfrastructureError: the registry, the results store or MLflow does not answer; nothing is marked.
        SettingsError: this host does not offer the isolation asked for; nothing is downloaded.
    """
    level = reached_level(settings.isolation)
    version = target.version
    audit_settings = audit_settings or settings.for_model(version.name)
    sweep = sweep or Sweep(settings, client, target.occasion, None)
    with contextlib.ExitStack() as stack:
        on_stage("downloading")
        folder = Path(stack.enter_context(private_folder()))
        fetched = fetch(
            version,
            client,
            folder,
            recipes=settings.recipes_folder,
            making_room=lambda size: stack.enter_context(sweep.room.for_bytes(size, sweep.stopping)),
        )
        snapshot, key = fetched.snapshot, DUE_AGAIN if fetched.again else None
        if snapshot is None:
            report = refused(fetched.refusal)
        elif recipe is not None:
            snapshot = dataclasses.replace(snapshot, recipe_folder=recipe.resolve(), recipe_source=str(recipe))
        if snapshot is not None:
            with sweep.alone(sweep.auditing):
                on_stage("auditing")
                try:
                    report = audit_snapshot(snapshot, folder, settings, audit_settings, stopping=sweep.stopping)
                except GradauditError:
                    raise
                except Exception as error:
                    _log.exception("an error of gradaudit's own, on %s", version.label)
                    report = refused(f"an error of gradaudit's own: {type(error).__name__}: {error}", cause="own error")
                    key = DUE_AGAIN
        recipe_yaml = _recipe_text(snapshot)
    fingerprint = digest(
        version.name,
        version.version,
        snapshot.digest if snapshot else "",
        report.identity.recipe_digest,
        audit_settings.digest(),
        trusted_digest(settings, version.name),
        standing_waivers(settings, version.name, version.version),
        environment(settings),
    )
    report = with_identity(
        report,
        audit_id=digest(fingerprint, target.occasion),
        audited_at=datetime.datetime.now(datetime.UTC),
        model_name=version.name,
        model_version=version.version,
        model_digest=snapshot.digest if snapshot else "",
        settings_digest=audit_settings.digest(),
        artifact_kind=snapshot.artifact_kind if snapshot else "unknown",
        isolation=str(level),
    )
    if snapshot is not None:
        report = _with_parts(report, snapshot)
    report = under_waivers(report, settings)
    if not write:
        return report
    with sweep.alone(sweep.keeping):
        on_stage("publishing")
        return keep(
            report,
            version,
            client,
            settings,
            fingerprint=fingerprint,
            key=due_key(version, settings, audit_settings) if key is None else key,
            occasion=target.occasion,
            recipe_yaml=recipe_yaml,
            rerun=rerun_command(version, settings.tracking_uri),
        )


def audit_directory(
    folder: Path,
    settings: GradauditSettings,
    *,
    audit_settings: AuditSettings | None = None,
    recipe: Path | None = None,
) -> AuditReport:
    """Audit a local model directory; nothing is stored, published or marked.

    Raises:
        ArtifactError: it is no model directory.
        SettingsError: this host does not offer the isolation asked for.
    """
    audit_settings = audit_settings or settings.audit_settings
    snapshot = read_snapshot(folder.resolve(), overlay=recipe and recipe.resolve(), overlay_source=str(recipe or ""))
    with private_folder() as temporary:
        report = audit_snapshot(snapshot, Path(temporary), settings, audit_settings)
    return with_identity(
        report,
        audit_id=digest(snapshot.digest, fresh_occasion()),
        model_name=folder.name,
        model_digest=snapshot.digest,
        artifact_kind=snapshot.artifact_kind,
        isolation=str(reached_level(settings.isolation)),
    )


def audit_snapshot(
    snapshot: Snapshot,
    folder: Path,
    settings: GradauditSettings,
    audit_settings: AuditSettings,
    *,
    stopping: threading.Event | None = None,
) -> AuditReport:
    """Audit a snapshot in child processes: the best way there is memory for, the report saying what was not.

    Args:
        snapshot: the files.
        folder: private folder of this audit.
        settings: device and limits.
        audit_settings: what to check.
        stopping: once it is set, the audit ends.

    Raises:
        InfrastructureError: the child's process cannot be started.
        SettingsError: this host does not offer the isolation asked for.
        Stopped: ``stopping`` was set.
    """
    reasons: list[str] = []
    stopping = stopping or threading.Event()
    report = refused("no way to audit it was found", cause="out of memory")
    for number, (way, reason) in enumerate(ways(snapshot, settings.device, audit_settings)):
        reasons += [reason] if reason else []
        with held(way.device, settings, stopping):
            report = run_way(snapshot, folder / f"way-{number}", settings, way, stopping=stopping)
            if suspected(report):  # of the first call: a second child's first call tells
                fresh = run_way(snapshot, folder / f"way-{number}-afresh", settings, way, stopping=stopping)
                report = settled(report, fresh)
        report = told(report, way, reasons)
        if not ran_out(report):
            break
    return under_severities(report, audit_settings)


def run_way(
    snapshot: Snapshot, folder: Path, settings: GradauditSettings, way: Way, *, stopping: threading.Event
) -> AuditReport:
    """Run the child on a snapshot and read its answer; a child that dies again and again is inconclusive.

    Raises:
        InfrastructureError: the child's process cannot be started.
        SettingsError: this host does not offer the isolation asked for.
        Stopped: ``stopping`` was set.
    """
    level, limits = reached_level(settings.isolation), limits_of(settings)
    for attempt in range(settings.attempts):
        place = folder / f"attempt-{attempt}"
        answer = place / "answer.jsonl"
        place.mkdir(parents=True)
        request = {
            **snapshot.request(),
            "settings": way.settings.to_mapping(),
            "device": way.device,
        }
        end = run_child(
            request,
            place,
            limits,
            level=level,
            readable=shown(snapshot),
            answer=answer,
            extra=settings.readable_paths,
            stopping=stopping,
        )
        _log.debug("attempt %d printed:\n%s", attempt + 1, end.log)
        if end.cause is None:
            if level is not Level.BUBBLEWRAP and rewritten(snapshot):
                return refused("the audited version rewrote its own files while it was audited", cause="rewritten")
            try:
                return read_answer(answer, seconds=end.seconds)
            except InputError as error:
                return refused(clean(str(error)), cause="bad answer")
        _log.warning("attempt %d: %s\n%s", attempt + 1, end.message, end.log)
        if end.cause != "crashed":
            break
    return refused(end.message, cause=end.cause or "crashed")


def _with_parts(report: AuditReport, snapshot: Snapshot) -> AuditReport:
    """Add what the files say of weights and code to what the audit's process says of recipe and sources."""
    return dataclasses.replace(
        report, parts={**report.parts, **snapshot.parts, "gradaudit": metadata.version("gradaudit")}
    )


def rerun_command(version: Version, tracking_uri: str) -> str:
    """Return the command that repeats an audit, with ``{options}`` for what narrows it; braces in names are doubled."""
    return rerun_of(version.uri, tracking_uri)


def _recipe_text(snapshot: Snapshot | None) -> str | None:
    if snapshot is None or snapshot.recipe_folder is None:
        return None
    path = snapshot.recipe_folder / RECIPE_FILE
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
