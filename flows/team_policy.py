"""What a team says of an audit's findings: its severities and waivers, applied by the parent, never by the child."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path

from audits.checks.severities import with_severities
from audits.report import AuditReport
from audits.settings import AuditSettings
from audits.waivers import Waiver, standing, waived
from flows.settings.environment import GradauditSettings


def waivers_of(settings: GradauditSettings) -> tuple[Waiver, ...]:
    """Read the waivers file, when there is one.

    Raises:
        SettingsError: it is missing or broken. A sweep does not start then: without its waivers it would fail versions
            that nobody wants failed, with them it would guess.
    """
    if not settings.waivers:
        return ()
    from registry_models.waiver_files import read_waivers

    return read_waivers(Path(settings.waivers))


def under_severities(report: AuditReport, audit_settings: AuditSettings) -> AuditReport:
    """Return the report under the team's severities, the rows about the version itself included."""
    return dataclasses.replace(report, rows=tuple(with_severities(report.rows, audit_settings.severity)))


def under_waivers(report: AuditReport, settings: GradauditSettings) -> AuditReport:
    """Return the report of a registered version with its waived findings marked."""
    return waived(report, waivers_of(settings), today())


def standing_waivers(settings: GradauditSettings, name: str, version: int) -> str:
    """Return a digest of the waivers about a version that hold today, and of those that held."""
    return standing(waivers_of(settings), name, version, today())


def today() -> datetime.date:
    """Return the day, UTC."""
    return datetime.datetime.now(datetime.UTC).date()
