"""``gradaudit gate``: may this version go on? One line and an exit code, about exactly one version."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from audits.naming import label_of, visible
from audits.outcomes import Outcome
from audits.report import reason_of
from audits.results.store import ResultsStore
from audits.signs import SIGNS
from flows.arguments import refuse_device, refuse_settings
from flows.cli.display import log_line
from flows.cli.exit_codes import EXIT_CODES
from flows.one_audit.attesting import refuse_outdated, verified_version
from flows.one_audit.gate import Believed, believed_audit
from flows.output import RESULTS, print_json
from flows.sandbox.private_folders import remove_stale
from flows.settings.environment import GradauditSettings
from registry_models.attestation.refusals import RefusedAttestationError
from registry_models.attestation.signing import public_key
from registry_models.registry.connecting import connect
from registry_models.registry.versions import Version, VersionReference, registered
from registry_models.report.text import one_line

#: The exit code of a gate that has no verdict: nothing is promoted by it.
NO_VERDICT = 2


def run_gate(
    target: str,
    settings: GradauditSettings,
    *,
    max_age: datetime.timedelta | None,
    timeout: float | None,
    make: bool,
    as_json: bool,
) -> int:
    """Print the verdict on the version that ``target`` is now; return 0 pass, 1 fail, 2 inconclusive or none.

    An alias is resolved once: whoever moves it meanwhile does not change what the verdict is about.

    Raises:
        InputError: there is no such version.
        InfrastructureError: the registry, the results store or MLflow does not answer.
    """
    refuse_settings(settings)
    refuse_device(settings.device)
    client = connect(settings.tracking_uri)
    version = registered(VersionReference.parse(target).resolve(client), client)
    if make:
        remove_stale()
        ResultsStore(settings.results).prove_writable()
    if timeout is None:
        timeout = settings.time_limit if make else 0.0
    believed = believed_audit(
        version,
        client,
        settings,
        max_age=max_age,
        timeout=timeout,
        make=make,
        on_waiting=lambda: log_line(f"waiting for the audit of {version.label} that is under way"),
    )
    told = _told(target, version, believed)
    if as_json:
        print_json(told, allow_nan=False)
    else:
        print(_line(told), file=RESULTS, flush=True)
    return int(told["exit_code"])


def run_attested_gate(
    target: str, settings: GradauditSettings, key: Path, *, max_age: datetime.timedelta | None, as_json: bool
) -> int:
    """Print the verdict of a valid attestation of exactly this version's files; return 0, 1 or 2 as `run_gate` does.

    Nothing that results, runs or tags say is believed beyond what the key's owner signed, and no audit is made.

    Raises:
        InputError: there is no such version or key.
        InfrastructureError: the registry does not answer.
    """
    refuse_settings(settings)
    public_key(key)
    client = connect(settings.tracking_uri)
    version = registered(VersionReference.parse(target).resolve(client), client)
    about = _about(target, version)
    try:
        statement, signer = verified_version(version, client, key, max_age=max_age)
        refuse_outdated(statement, version, settings)
    except RefusedAttestationError as error:
        reason = f"its attestation is refused: {error}"
        told = about | {"outcome": "none", "exit_code": NO_VERDICT, "reason": reason, "refusal": str(error.reason)}
    else:
        told = about | {
            "outcome": str(statement.outcome),
            "exit_code": EXIT_CODES[statement.outcome],
            "reason": reason_of(str(statement.predicate.get("headline", ""))),
            "audit_id": str(statement.predicate.get("auditId", "")),
            "audited_at": statement.audited_at.isoformat(),
            "coverage": float(statement.predicate.get("coverage", 0.0)),
            "made": False,
            "attested_by": signer,
        }
    if as_json:
        print_json(told, allow_nan=False)
    else:
        print(_line(told), file=RESULTS, flush=True)
    return int(told["exit_code"])


def _about(target: str, version: Version) -> dict[str, Any]:
    return {"schema": 1, "target": target, "model": version.name, "version": version.version, "uri": version.uri}


def _told(target: str, version: Version, believed: Believed | None) -> dict[str, Any]:
    about = _about(target, version)
    if believed is None:
        reason = "it has no audit as it is now, in this environment and young enough, and --no-audit makes none"
        return about | {"outcome": "none", "exit_code": NO_VERDICT, "reason": reason, "audit_id": None}
    report = believed.report
    return about | {
        "outcome": str(report.outcome),
        "exit_code": EXIT_CODES[report.outcome],
        "reason": reason_of(report.headline),
        "audit_id": report.identity.audit_id,
        "audited_at": report.identity.audited_at.isoformat(),
        "coverage": round(report.coverage, 6),
        "run_id": report.run_id,
        "made": believed.made,
    }


def _line(told: dict[str, Any]) -> str:
    label = label_of(told["model"], told["version"])
    alias = f", which {visible(told['target'])} was" if "@" in told["target"].rpartition("/")[2] else ""
    if told["outcome"] == "none":
        return f"{SIGNS[Outcome.INCONCLUSIVE]} no verdict: {label}{alias}: {told['reason']}"
    at = f"{datetime.datetime.fromisoformat(told['audited_at']):%Y-%m-%d %H:%M} UTC"
    signed = f", attested by key {told['attested_by'][:16]}" if "attested_by" in told else ""
    when = "made now" if told["made"] else f"of {at}"
    how = f"audit {told['audit_id'][:12]}, {when}, {told['coverage']:.0%} covered{signed}"
    why = f": {one_line(told['reason'])}" if told["reason"] else ""
    return f"{SIGNS[Outcome(told['outcome'])]} {told['outcome']}: {label}{alias} ({how}){why}"
