"""Which stored audit somebody means by ``models:/NAME/VERSION``, ``models:/NAME@ALIAS`` or an audit's id."""

from __future__ import annotations

import re
from typing import Any

from audits.errors import InputError
from audits.history.reading import find_audit, newest_audit, stored_report
from audits.naming import read_reference, reference_to
from audits.report import AuditReport
from audits.results.store import ResultsStore
from flows.rerunning import rerun_of
from flows.settings.environment import GradauditSettings

_AUDIT_ID = re.compile(r"[0-9a-f]{6,64}")


def stored_line(target: str, store: ResultsStore, settings: GradauditSettings) -> dict[str, Any]:
    """Return the line in ``audits`` that ``target`` means; only an alias asks the registry.

    Raises:
        InputError: there is no such version, alias or audit; the text names what there is.
        InfrastructureError: the store, or the registry, cannot be read.
    """
    named = read_reference(target)
    if named is not None and named.version is not None:
        return newest_audit(store, named.name, named.version)
    if target.startswith("models:"):
        from registry_models.registry.connecting import connect
        from registry_models.registry.versions import VersionReference

        version = VersionReference.parse(target).resolve(connect(settings.tracking_uri))
        return newest_audit(store, version.name, version.version)
    if _AUDIT_ID.fullmatch(target):
        return find_audit(store, target)
    raise InputError(
        f"{target!r} is neither models:/NAME/VERSION, models:/NAME@ALIAS nor an audit's id (at least 6 of its "
        "characters); to audit a directory, use `gradaudit audit`"
    )


def stored_audit(target: str, store: ResultsStore, settings: GradauditSettings) -> AuditReport:
    """Return the audit that ``target`` means, as it was when it was made.

    Raises:
        InputError: there is no such version, alias or audit; the text names what there is.
        InfrastructureError: the store, or the registry, cannot be read.
    """
    return stored_report(store, stored_line(target, store, settings))


def rerun_of_report(report: AuditReport, settings: GradauditSettings) -> str:
    """Return the command that repeats a stored audit."""
    identity = report.identity
    return rerun_of(reference_to(identity.model_name, identity.model_version or 0), settings.tracking_uri)
