"""What an attestation says: an in-toto statement about a version's files, with the audit's verdict as predicate."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from audits.naming import reference_to
from audits.outcomes import WORST_FIRST, Outcome
from audits.report import AuditReport
from registry_models.attestation.refusals import Refusal, RefusedAttestationError

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"

#: What the predicate is. Fields are only ever added to it; another meaning would be another URI.
PREDICATE_TYPE = "https://gradaudit/training-audit/v1"


@dataclass(frozen=True)
class Statement:
    """A statement that has been read from a valid envelope.

    Attributes:
        name: ``models:/NAME/VERSION`` of the version that was audited.
        digest: SHA-256 of its files (`registry_models.artifacts.content_digest`).
        outcome: the audit's.
        audited_at: when the audit ended.
        expires: when the statement ends, if it does.
        predicate: everything else that it says.
    """

    name: str
    digest: str
    outcome: Outcome
    audited_at: datetime.datetime
    expires: datetime.datetime | None
    predicate: Mapping[str, Any]

    def refuse_foreign(self, digest: str, name: str | None = None) -> None:
        """Refuse what is about other files, or another version.

        Raises:
            RefusedAttestationError: it is.
        """
        if digest != self.digest:
            text = f"it is about other files: about {self.name} with {self.digest[:16]}, and these have {digest[:16]}"
            raise RefusedAttestationError(Refusal.FOREIGN, text)
        if name is not None and name != self.name:
            raise RefusedAttestationError(Refusal.FOREIGN, f"it is about another version, {self.name}, not {name}")

    def refuse_expired(self, max_age: datetime.timedelta | None, now: datetime.datetime | None = None) -> None:
        """Refuse what has ended, or whose audit is too old.

        Raises:
            RefusedAttestationError: it has, or is.
        """
        now = now or datetime.datetime.now(datetime.UTC)
        if self.expires is not None and now >= self.expires:
            raise RefusedAttestationError(Refusal.EXPIRED, f"it has expired: it was valid until {_shown(self.expires)}")
        if max_age is not None and now - self.audited_at > max_age:
            text = f"it is too old: the audit is of {_shown(self.audited_at)}, and --max-age asks for a later one"
            raise RefusedAttestationError(Refusal.EXPIRED, text)


def statement_of(
    report: AuditReport, *, digest: str, due_key: str, environment: str, expires: datetime.datetime | None = None
) -> dict[str, Any]:
    """Return the statement about a stored audit.

    Args:
        report: the audit of a registered version.
        digest: SHA-256 of the version's files.
        due_key: digest of what the version's owner can change: source, recipe, settings, waivers.
        environment: what the audit ran with, as ``results/audits`` has it.
        expires: when the statement ends, if it is to.
    """
    identity = report.identity
    order = {outcome: rank for rank, outcome in enumerate(WORST_FIRST)}
    checks: dict[str, Outcome] = {}
    for row in report.rows:
        checks[row.check] = min(checks.get(row.check, row.counted), row.counted, key=order.__getitem__)
    return {
        "_type": STATEMENT_TYPE,
        "subject": [
            {"name": reference_to(identity.model_name, identity.model_version or 0), "digest": {"sha256": digest}}
        ],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "outcome": str(report.outcome),
            "headline": report.headline,
            "coverage": round(report.coverage, 6),
            "counts": report.counts,
            "checks": {check: str(outcome) for check, outcome in sorted(checks.items())},
            "waivers": list(report.waivers),
            "limits": list(report.limits),
            "environment": {
                "description": environment,
                "sha256": hashlib.sha256(environment.encode()).hexdigest(),
                "device": identity.device,
                "isolation": identity.isolation,
            },
            "recipe": {"digest": identity.recipe_digest},
            "settings": {"digest": identity.settings_digest},
            "dueKey": due_key,
            "auditId": identity.audit_id,
            "auditedAt": _shown(identity.audited_at),
            "runId": report.run_id,
            "attestedAt": _shown(datetime.datetime.now(datetime.UTC)),
            "expires": None if expires is None else _shown(expires),
            "attestedBy": f"gradaudit {metadata.version('gradaudit')}",
        },
    }


def read_statement(payload: bytes) -> Statement:
    """Return what a valid envelope's payload says.

    Raises:
        RefusedAttestationError: it is signed and is no statement about an audit.
    """
    try:
        found = json.loads(payload)
        kinds = (found["_type"], found["predicateType"])
        if kinds != (STATEMENT_TYPE, PREDICATE_TYPE):
            raise RefusedAttestationError(Refusal.KIND, f"it is signed and says something else: {kinds[1]!r}")
        ((subject,), predicate) = found["subject"], found["predicate"]
        expires = predicate["expires"]
        return Statement(
            name=str(subject["name"]),
            digest=str(subject["digest"]["sha256"]),
            outcome=Outcome(predicate["outcome"]),
            audited_at=_time(predicate["auditedAt"]),
            expires=None if expires is None else _time(expires),
            predicate=predicate,
        )
    except RefusedAttestationError:
        raise
    except Exception as error:  # its owner signed something that only looks like one
        text = f"it is signed and is no statement about an audit: {type(error).__name__}: {error}"
        raise RefusedAttestationError(Refusal.KIND, text) from error


def _shown(time: datetime.datetime) -> str:
    return time.astimezone(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _time(text: str) -> datetime.datetime:
    found = datetime.datetime.fromisoformat(text)
    if found.tzinfo is None:
        raise ValueError(f"{text} has no time zone")
    return found
