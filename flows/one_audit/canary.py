"""A reference model with a known verdict, audited before anything else: a sick GPU is no fleet of bad models.

The reference has two twins side by side: a layer whose derivative is right and one whose derivative is wrong on
purpose. Where the right one fails, or the wrong one passes, nothing that this host says can be believed: the sweep ends
with an error of the environment, before a version is touched.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import tempfile
import threading
from pathlib import Path

from audits.errors import InfrastructureError
from audits.report import AuditReport
from audits.settings import AuditSettings
from flows.choosing.due_keys import digest, environment
from flows.choosing.progress import listener
from flows.choosing.sweeping import state_folder
from flows.one_audit.fallback import MemoryPlan
from flows.one_audit.gpu import chosen_gpu, held
from flows.one_audit.one_snapshot import run_plan
from flows.sandbox.private_folders import private_folder
from flows.settings.environment import GradauditSettings
from registry_models.artifacts.snapshot import read_snapshot


def prove_environment(settings: GradauditSettings, *, stopping: threading.Event | None = None) -> None:
    """Audit the reference model, once per day, device, environment and worker process.

    Raises:
        InfrastructureError: this host does not reproduce the known verdict; it names what differed.
    """
    stamp = state_folder(settings) / f"canary-{digest(*_occasion(settings))}.json"
    if stamp.exists():
        return
    listener().stage("reference model", "checking")
    began = datetime.datetime.now(datetime.UTC)
    stopping = stopping or threading.Event()
    from registry_models.reference.reference_files import write_reference  # with torch, once a day

    with private_folder() as temporary, held(settings.device, settings, stopping):
        snapshot = read_snapshot(write_reference(Path(temporary) / "reference"))
        plan = MemoryPlan(settings.device, AuditSettings(), settings.device)
        report = run_plan(snapshot, Path(temporary) / "way", settings, plan, stopping=stopping)
    difference = differs(report)
    if difference:
        raise InfrastructureError(
            f"environment fault, nothing was audited or marked: the reference model's verdict on this host is not the "
            f"known one ({difference}); {environment(settings)}, device {report.identity.device or 'unknown'}, host "
            f"{os.uname().nodename}. Suspect the GPU, its driver or a changed build of torch, not the models"
        )
    _stamp(stamp, report, began)


def differs(report: AuditReport) -> str:
    """Return how the reference's report differs from the known verdict; empty when it does not."""
    from registry_models.reference.reference_files import EXPECTED_CHECKS, WRONG_PARAMETER

    if not report.failed_parameters and not report.failed_checks:
        return f"the derivative that is wrong on purpose was not found: {report.headline}"
    if report.failed_parameters != [WRONG_PARAMETER] or set(report.failed_checks) != EXPECTED_CHECKS:
        named = ", ".join(report.failed_parameters) or "no parameter"
        return f"it fails {', '.join(report.failed_checks)} at {named}, it should fail only at {WRONG_PARAMETER}"
    if report.coverage < 1.0:
        return f"only {report.coverage:.0%} of its parameters could be judged: {report.headline}"
    return ""


def _occasion(settings: GradauditSettings) -> tuple[str, ...]:
    gpu = chosen_gpu(settings.device)
    return (
        datetime.datetime.now(datetime.UTC).date().isoformat(),
        environment(settings),
        gpu.uuid if gpu else "cpu",
        settings.isolation,
        _worker(),
    )


def _worker() -> str:
    """The worker process that started this flow run, so that a new worker proves itself; empty outside of one."""
    from prefect.runtime import deployment

    if not deployment.id:
        return ""
    parent = os.getppid()
    with contextlib.suppress(OSError):
        started = Path(f"/proc/{parent}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return f"{parent} {started[19]}"
    return str(parent)


def _stamp(stamp: Path, report: AuditReport, began: datetime.datetime) -> None:
    """Leave the proof, and clear away those of past days."""
    for old in stamp.parent.glob("canary-*.json"):
        with contextlib.suppress(OSError):
            if began.timestamp() - old.stat().st_mtime > 2 * 86_400:
                old.unlink()
    words = {"at": began.isoformat(timespec="seconds"), "device": report.identity.device, "seconds": report.seconds}
    try:
        with tempfile.NamedTemporaryFile("w", dir=stamp.parent, delete=False) as stream:
            json.dump(words, stream)
        os.replace(stream.name, stamp)
    except OSError as error:
        raise InfrastructureError(f"{stamp.parent} cannot be written: {error}") from error
