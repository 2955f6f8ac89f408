"""Committed audits as a sweep leaves them, for tests of what is due."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from audits.results.format import AuditIdentity, audits_table
from audits.results.store import ResultsStore
from flows.choosing.due_keys import due_key, environment
from flows.settings.environment import GradauditSettings
from registry_models.registry.versions import Version


def commit(
    folder: Path,
    version: Version,
    settings: GradauditSettings,
    *,
    days_ago: float = 0.0,
    outcome: str = "pass",
    seconds: float = 1.0,
    kind: str = "eager",
    occasion: str = "x",
    ran_in: str | None = None,
    unjudged: str | None = None,
) -> None:
    """Write an audit's line under the version's present due key."""
    at = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=days_ago)
    audit_id = f"{version.name}-{version.version}-{at.timestamp():.6f}"
    who = AuditIdentity(
        audit_id=audit_id, audited_at=at, model_name=version.name, model_version=version.version, artifact_kind=kind
    )
    line: dict[str, Any] = dict.fromkeys(
        ("n_pass", "n_warn", "n_fail", "n_inconclusive", "n_skipped", "coverage", "coverage_elements"), 0
    )
    line |= dict.fromkeys(("run_id", "fingerprint"), "x")
    table = audits_table(
        who,
        **line,
        outcome=outcome,
        seconds=seconds,
        occasion=occasion,
        unjudged=unjudged,
        message=f"{outcome.upper()}: said so.",
        due_key=due_key(version, settings, settings.audit_settings),
        environment=environment(settings) if ran_in is None else ran_in,
    )
    ResultsStore(folder / "results").write("audits", table, date=at.date(), audit_id=audit_id)
