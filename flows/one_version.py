"""The way of one audit: snapshot, child, store, publish, mark, commit. Knows no Prefect and no arithmetic."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import logging
import shlex
import uuid
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from mlflow.tracking import MlflowClient

from audits.errors import ArtifactError, InputError, RecipeError
from audits.report import AuditReport
from audits.run import refused, with_identity
from audits.settings import AuditSettings
from flows.isolation import limits_of, private_folder, run_child
from flows.keeping import keep
from flows.sandbox import Level, reached_level
from flows.sandbox.answer_file import read_untrusted
from flows.sandbox.artifact import rewritten, shown
from flows.settings import GradauditSettings
from registry_models.answer import clean
from registry_models.recipe_files import RECIPE_FILE
from registry_models.recipe_sources import matching_digest
from registry_models.snapshot import Snapshot, download_version, read_snapshot
from registry_models.versions import RECIPE_TAG, Version

_log = logging.getLogger(__name__)


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


def due_key(version: Version, settings: GradauditSettings, audit_settings: AuditSettings) -> str:
    """Return the digest that tells, without a download, whether what a verdict depends on has changed."""
    return _digest(
        version.name,
        version.version,
        version.source,
        version.tags.get(RECIPE_TAG, ""),
        audit_settings.digest(),
        *_environment(settings, version.name),
    )


def audit_version(
    target: Target,
    client: MlflowClient,
    settings: GradauditSettings,
    *,
    audit_settings: AuditSettings | None = None,
    write: bool = True,
    recipe: Path | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
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

    Returns:
        The report. A version that could not be audited has an ``inconclusive`` one with the cause.

    Raises:
        InfrastructureError: the registry, the results store or MLflow does not answer; nothing is marked.
        SettingsError: this host does not offer the isolation asked for; nothing is downloaded.
    """
    level = reached_level(settings.isolation)
    version = target.version
    audit_settings = audit_settings or settings.audit_settings
    key = due_key(version, settings, audit_settings)
    with private_folder() as temporary:
        folder = Path(temporary)
        on_stage("downloading")
        snapshot: Snapshot | None = None
        try:
            snapshot = download_version(version, client, folder, recipes=settings.recipes_folder)
            if recipe is not None:
                snapshot = dataclasses.replace(snapshot, recipe_folder=recipe.resolve(), recipe_source=str(recipe))
        except ArtifactError as error:
            report = refused(str(error))
        if snapshot is not None:
            on_stage("auditing")
            report = audit_snapshot(snapshot, folder, settings, audit_settings)
        recipe_yaml = _recipe_text(snapshot)
    fingerprint = _digest(
        version.name,
        version.version,
        snapshot.digest if snapshot else "",
        report.identity.recipe_digest,
        audit_settings.digest(),
        *_environment(settings, version.name),
    )
    report = with_identity(
        report,
        audit_id=_digest(fingerprint, target.occasion),
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
    if not write:
        return report
    on_stage("publishing")
    return keep(
        report,
        version,
        client,
        settings,
        fingerprint=fingerprint,
        key=key,
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
        audit_id=_digest(snapshot.digest, fresh_occasion()),
        model_name=folder.name,
        model_digest=snapshot.digest,
        artifact_kind=snapshot.artifact_kind,
        isolation=str(reached_level(settings.isolation)),
    )


def audit_snapshot(
    snapshot: Snapshot, folder: Path, settings: GradauditSettings, audit_settings: AuditSettings
) -> AuditReport:
    """Run the child on a snapshot and read its answer; a child that dies again and again is inconclusive.

    Raises:
        InfrastructureError: the child's process cannot be started.
        SettingsError: this host does not offer the isolation asked for.
    """
    level, limits = reached_level(settings.isolation), limits_of(settings)
    for attempt in range(settings.attempts):
        place = folder / f"attempt-{attempt}"
        answer = place / "answer"
        answer.mkdir(parents=True)
        request = {
            **snapshot.request(),
            "settings": audit_settings.to_mapping(),
            "device": settings.device,
            "answer_folder": str(answer),
        }
        end = run_child(
            request,
            place,
            limits,
            level=level,
            readable=shown(snapshot),
            answer=answer,
            extra=settings.readable_paths,
        )
        if end.cause is None:
            if level is not Level.BUBBLEWRAP and rewritten(snapshot):
                return refused("the audited version rewrote its own files while it was audited", cause="rewritten")
            try:
                return read_untrusted(answer)
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
    command = shlex.join(["gradaudit", "audit", version.uri, "--tracking-uri", tracking_uri])
    return command.replace("{", "{{").replace("}", "}}") + " {options}"


def _recipe_text(snapshot: Snapshot | None) -> str | None:
    if snapshot is None or snapshot.recipe_folder is None:
        return None
    path = snapshot.recipe_folder / RECIPE_FILE
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def _environment(settings: GradauditSettings, model_name: str) -> tuple[str, ...]:
    return metadata.version("gradaudit"), metadata.version("torch"), settings.device, _trusted(settings, model_name)


def _trusted(settings: GradauditSettings, model_name: str) -> str:
    """Return a digest of what the trusted recipe repository says of a model: a verdict depends on it."""
    folder = settings.recipes_folder
    if folder is None:
        return ""
    try:
        return matching_digest(folder, model_name)
    except RecipeError as error:  # a broken file is told by the audit it concerns, it does not stop a sweep
        return f"broken: {error}"


def _digest(*parts: object) -> str:
    return hashlib.sha256("\0".join(str(part) for part in parts).encode()).hexdigest()[:24]
