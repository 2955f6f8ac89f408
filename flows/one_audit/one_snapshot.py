"""The audit of one snapshot in child processes: each way there is memory for, each answer read and none trusted."""

from __future__ import annotations

import dataclasses
import logging
import threading
from pathlib import Path

from audits.causes import Cause
from audits.errors import InputError
from audits.refusals import refused
from audits.repeating.settling import settled, suspected
from audits.report import AuditReport
from audits.settings import AuditSettings
from flows.one_audit.fallback import MemoryPlan, memory_plans, out_of_memory, with_fallback_note
from flows.one_audit.gpu import held
from flows.sandbox import Level, reached_level
from flows.sandbox.artifact import rewritten, shown
from flows.sandbox.isolation import run_child
from flows.sandbox.limits import limits_of
from flows.sandbox.standby import Standby
from flows.settings.environment import GradauditSettings
from flows.team_policy import under_severities
from registry_models.artifacts.snapshot import Snapshot
from registry_models.child.answer import clean, read_answer

_log = logging.getLogger(__name__)


def audit_snapshot(
    snapshot: Snapshot,
    folder: Path,
    settings: GradauditSettings,
    audit_settings: AuditSettings,
    *,
    stopping: threading.Event | None = None,
    standby: Standby | None = None,
) -> AuditReport:
    """Audit a snapshot in child processes: the best way there is memory for, the report saying what was not.

    Args:
        snapshot: the files.
        folder: private folder of this audit.
        settings: device and limits.
        audit_settings: what to check.
        stopping: once it is set, the audit ends.
        standby: a process that was started before, for the first child.

    Raises:
        InfrastructureError: the child's process cannot be started.
        SettingsError: this host does not offer the isolation asked for.
        Stopped: ``stopping`` was set.
    """
    reasons: list[str] = []
    stopping = stopping or threading.Event()
    report = refused("no way to audit it was found", cause=Cause.OUT_OF_MEMORY)
    for number, (plan, reason) in enumerate(memory_plans(snapshot, settings.device, audit_settings)):
        reasons += [reason] if reason else []
        with held(plan.device, settings, stopping):
            report = run_plan(snapshot, folder / f"plan-{number}", settings, plan, stopping=stopping, standby=standby)
            if suspected(report):  # of the first call: a second child's first call tells
                fresh = run_plan(snapshot, folder / f"plan-{number}-afresh", settings, plan, stopping=stopping)
                report = settled(report, fresh)
        report = with_fallback_note(report, plan, reasons)
        if not out_of_memory(report):
            break
    judged = under_severities(report, audit_settings)
    return dataclasses.replace(judged, narrowed=audit_settings.narrowed)


def run_plan(
    snapshot: Snapshot,
    folder: Path,
    settings: GradauditSettings,
    plan: MemoryPlan,
    *,
    stopping: threading.Event,
    standby: Standby | None = None,
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
            "settings": plan.settings.to_mapping(),
            "device": plan.device,
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
            standby=standby,
        )
        _log.debug("attempt %d printed:\n%s", attempt + 1, end.log)
        if end.cause is None:
            if level is not Level.BUBBLEWRAP and rewritten(snapshot):
                return refused("the audited version rewrote its own files while it was audited", cause=Cause.REWRITTEN)
            try:
                return read_answer(answer, seconds=end.seconds)
            except InputError as error:
                return refused(clean(str(error)), cause=Cause.BAD_ANSWER)
        _log.warning("attempt %d: %s\n%s", attempt + 1, end.message, end.log)
        if end.cause != Cause.CRASHED:
            break
    return refused(end.message, cause=end.cause or Cause.CRASHED)
