"""The way of one audit: snapshot, child, store, publish, mark, commit. Knows no Prefect and no arithmetic."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import logging
import uuid
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from mlflow.tracking import MlflowClient

from audits.causes import Cause
from audits.errors import GradauditError, InfrastructureError, SettingsError
from audits.naming import visible, with_names
from audits.refusals import refused, with_identity
from audits.report import AuditReport
from audits.settings import AuditSettings
from flows.arguments import refuse_device
from flows.choosing.due_keys import digest, due_key, environment, trusted_digest
from flows.choosing.sweeping import Sweep
from flows.one_audit.fetching import fetch
from flows.one_audit.one_snapshot import audit_snapshot
from flows.one_audit.storing import store_publish_mark_commit
from flows.rerunning import rerun_of
from flows.sandbox import reached_level
from flows.sandbox.artifact import shown
from flows.sandbox.standby import Standby, standing_by
from flows.settings.environment import GradauditSettings
from flows.team_policy import standing_waivers, under_waivers
from registry_models.artifacts.first_look import outside_of
from registry_models.artifacts.flavours import NOTHING_TO_TRAIN, OutsideError, nothing_to_train
from registry_models.artifacts.snapshot import Snapshot, read_snapshot
from registry_models.child.answer import clean
from registry_models.recipes.recipe_names import RECIPE_FILE
from registry_models.registry.versions import Version

_log = logging.getLogger(__name__)

#: Of a recipe's file a report shows this much; those of 2,000 parameters are about 200 kB.
SHOWN_RECIPE_BYTES = 2**20

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
    standby: Standby | None = None,
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
        standby: the audit's folder and its process, started before; they are made here otherwise.

    Returns:
        The report. A version that could not be audited has an ``inconclusive`` one with the cause.

    Raises:
        OutsideError: the version is outside the audit; nothing is stored, published or marked.
        InfrastructureError: the registry, the results store or MLflow does not answer; nothing is marked.
        SettingsError: this host does not offer the isolation or the device asked for; nothing is downloaded.
    """
    level = reached_level(settings.isolation)
    refuse_device(settings.device)
    version = target.version
    audit_settings = audit_settings or settings.for_model(version.name)
    sweep = sweep or Sweep(settings, client, target.occasion, None)
    made = _download_and_audit(version, client, settings, audit_settings, recipe, sweep, on_stage, standby)
    model_digest = made.snapshot.digest if made.snapshot else ""
    fingerprint = digest(
        version.name,
        version.version,
        model_digest,
        made.report.identity.recipe_digest,
        audit_settings.digest(),
        trusted_digest(settings, version.name),
        standing_waivers(settings, version.name, version.version),
        environment(settings),
    )
    report = with_identity(
        made.report,
        audit_id=digest(fingerprint, target.occasion),
        audited_at=datetime.datetime.now(datetime.UTC),
        model_name=version.name,
        model_version=version.version,
        model_digest=model_digest,
        settings_digest=audit_settings.digest(),
        artifact_kind=made.snapshot.artifact_kind if made.snapshot else "unknown",
        isolation=str(level),
    )
    if made.snapshot is not None:
        report = _with_parts(report, made.snapshot)
    report = under_waivers(_naming(report, version), settings)
    if not write:
        return report
    keeping = functools.partial(
        store_publish_mark_commit,
        version=version,
        client=client,
        settings=settings,
        fingerprint=fingerprint,
        occasion=target.occasion,
        rerun=rerun_command(version, settings.tracking_uri),
    )
    with sweep.alone(sweep.keeping):
        on_stage("publishing")
        key = made.key or due_key(version, settings, audit_settings)
        try:
            return keeping(report, key=key, recipe_yaml=made.recipe_yaml)
        except GradauditError:
            raise
        except Exception as error:  # what the answer or the files hold cannot be shown or stored: this is said instead
            instead = dataclasses.replace(own_error(error, version), identity=report.identity)
            return keeping(instead, key=DUE_AGAIN, recipe_yaml=None)


@dataclasses.dataclass(frozen=True)
class _Audited:
    """What came of a version's files; ``key`` where it is not to be due by its own, ``recipe_yaml`` for the report."""

    report: AuditReport
    snapshot: Snapshot | None
    key: str | None
    recipe_yaml: str | None


def _download_and_audit(
    version: Version,
    client: MlflowClient,
    settings: GradauditSettings,
    audit_settings: AuditSettings,
    recipe: Path | None,
    sweep: Sweep,
    on_stage: Callable[[str], None],
    standby: Standby | None,
) -> _Audited:
    with contextlib.ExitStack() as stack:
        on_stage("downloading")
        standby = standby or stack.enter_context(standing_by(settings))
        folder = standby.folder
        fetched = fetch(
            version,
            client,
            folder,
            recipes=settings.recipes_folder,
            making_room=lambda size: stack.enter_context(sweep.disk_budget.for_bytes(size, sweep.stopping)),
        )
        snapshot, key = fetched.snapshot, DUE_AGAIN if fetched.again else None
        if snapshot is None:
            return _Audited(refused(fetched.refusal), None, key, None)
        if recipe is not None:
            snapshot = dataclasses.replace(snapshot, recipe_folder=recipe.resolve(), recipe_source=str(recipe))
        refuse_outside(snapshot, version.label)
        with sweep.alone(sweep.auditing):
            on_stage("auditing")
            snapshot = standby.hand_over(snapshot, shown(snapshot))
            try:
                report = audit_snapshot(
                    snapshot, folder, settings, audit_settings, stopping=sweep.stopping, standby=standby
                )
            except (InfrastructureError, SettingsError):
                raise
            except GradauditError as error:
                report = refused(clean(str(error)))
            except Exception as error:
                report, key = own_error(error, version), DUE_AGAIN
        refuse_untrained(report, version.label)
        return _Audited(report, snapshot, key, _recipe_text(snapshot))


def _naming(report: AuditReport, version: Version) -> AuditReport:
    """Return the report with the version's own name in its cures."""

    def named(text: str | None) -> str | None:
        return text and with_names(text, version.name, version.version)

    rows = (
        dataclasses.replace(row, message=named(row.message) or "", where_to_look=named(row.where_to_look))
        for row in report.rows
    )
    return dataclasses.replace(report, rows=tuple(rows))


def refuse_outside(snapshot: Snapshot, label: str) -> None:
    """Refuse files that say of themselves that they are outside the audit.

    Raises:
        OutsideError: they do, and no recipe says how a torch model in them is trained.
    """
    found = outside_of(snapshot.folder)
    if found is not None and not (found.flavour == NOTHING_TO_TRAIN and snapshot.recipe_folder is not None):
        raise OutsideError(label, found)


def refuse_untrained(report: AuditReport, label: str) -> None:
    """Refuse a module that, once it was loaded, turned out to have nothing to train.

    Raises:
        OutsideError: it has not.
    """
    if [row.cause for row in report.rows] == [Cause.NOTHING_TO_TRAIN]:
        raise OutsideError(label, nothing_to_train())


def own_error(error: Exception, version: Version) -> AuditReport:
    """Return the report of a version over which something of gradaudit's own broke; the log has the traceback."""
    _log.error("an error of gradaudit's own, on %s", version.label, exc_info=error)
    text = clean(f"an error of gradaudit's own: {type(error).__name__}: {error}", 300)
    return refused(text, cause=Cause.OWN_ERROR)


def audit_directory(
    folder: Path,
    settings: GradauditSettings,
    *,
    audit_settings: AuditSettings | None = None,
    recipe: Path | None = None,
    standby: Standby | None = None,
) -> AuditReport:
    """Audit a local model directory; nothing is stored, published or marked.

    Args:
        folder: the directory.
        settings: device and limits.
        audit_settings: what to check; those in ``settings`` otherwise.
        recipe: a folder with a recipe to use instead of the directory's.
        standby: the audit's folder and its process; one that was started to see the directory need not start again.

    Raises:
        ArtifactError: it is no model directory.
        OutsideError: its model is outside the audit.
        SettingsError: this host does not offer the isolation asked for.
    """
    audit_settings = audit_settings or settings.audit_settings
    snapshot = read_snapshot(folder.resolve(), overlay=recipe and recipe.resolve(), overlay_source=str(recipe or ""))
    refuse_outside(snapshot, visible(folder.name))
    with contextlib.ExitStack() as stack:
        standby = standby or stack.enter_context(standing_by(settings, readable=[snapshot.folder]))
        report = audit_snapshot(snapshot, standby.folder, settings, audit_settings, standby=standby)
    refuse_untrained(report, visible(folder.name))
    return with_identity(
        report,
        audit_id=digest(snapshot.digest, fresh_occasion()),
        model_name=folder.name,
        model_digest=snapshot.digest,
        artifact_kind=snapshot.artifact_kind,
        isolation=str(reached_level(settings.isolation)),
    )


def _with_parts(report: AuditReport, snapshot: Snapshot) -> AuditReport:
    """Add what the files say of weights and code to what the audit's process says of recipe and sources."""
    return dataclasses.replace(
        report, parts={**report.parts, **snapshot.parts, "gradaudit": metadata.version("gradaudit")}
    )


def rerun_command(version: Version, tracking_uri: str) -> str:
    """Return the command that repeats an audit, with ``{options}`` for what narrows it; braces in names are doubled."""
    return rerun_of(version.uri, tracking_uri)


def _recipe_text(snapshot: Snapshot) -> str | None:
    if snapshot.recipe_folder is None:
        return None
    path = snapshot.recipe_folder / RECIPE_FILE
    if not path.is_file():
        return None
    try:
        with path.open("rb") as stream:
            text = stream.read(SHOWN_RECIPE_BYTES + 1)
    except OSError:
        return None
    cut = "\n# ... and more: the file is in the version\n" if len(text) > SHOWN_RECIPE_BYTES else ""
    return text[:SHOWN_RECIPE_BYTES].decode("utf-8", "replace") + cut
