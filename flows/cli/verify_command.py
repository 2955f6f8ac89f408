"""``gradaudit verify``: is an attestation valid, and about exactly these files? Of a directory without any network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

from audits.errors import ArtifactError, InputError
from audits.naming import visible
from audits.signs import SIGNS
from flows.ages import age_of
from flows.cli.exit_codes import EXIT_CODES, REFUSAL_CODES
from registry_models.artifacts.content_digest import whole_digest
from registry_models.attestation.refusals import RefusedAttestationError
from registry_models.attestation.signing import opened
from registry_models.attestation.statement import Statement, read_statement


def run_verify(
    target: str,
    key: Path,
    *,
    envelope: Path | None,
    max_age: str | None,
    as_json: bool,
    tracking_uri: str | None,
    out: TextIO,
) -> int:
    """Print what is attested, or why it is not believed; return the exit code.

    Args:
        target: a model directory, or a version of the registry.
        key: the public key that is believed.
        envelope: the attestation's file; of a version, the one beside its audit's run when None.
        max_age: an older audit is not believed.
        as_json: print one JSON object.
        tracking_uri: the registry; None for a directory.
        out: where the result goes.

    Raises:
        InputError: there is no such directory, version, attestation or key.
        InfrastructureError: the registry does not answer.
    """
    try:
        if tracking_uri is None:
            statement, signer = _of_directory(Path(target), key, envelope, max_age)
        else:
            statement, signer = _of_version(target, key, envelope, max_age, tracking_uri)
    except RefusedAttestationError as error:
        code = REFUSAL_CODES[error.reason]
        told: dict[str, Any] = {"schema": 1, "valid": False, "refusal": str(error.reason), "reason": f"{error}"}
        line = f"✗ refused: the attestation of {visible(target)}: {visible(f'{error}')}"
    else:
        code = EXIT_CODES[statement.outcome]
        told = {
            "schema": 1,
            "valid": True,
            "signed_by": signer,
            "subject": statement.name,
            "sha256": statement.digest,
            "predicate": statement.predicate,
        }
        line = _line(statement, signer)
    print(json.dumps(told | {"exit_code": code}, indent=2) if as_json else line, file=out, flush=True)
    return code


def _of_directory(folder: Path, key: Path, envelope: Path | None, max_age: str | None) -> tuple[Statement, str]:
    if not folder.is_dir():
        raise ArtifactError(
            f"{str(folder)!r} is neither models:/NAME/VERSION, models:/NAME@ALIAS nor a model directory"
        )
    if envelope is None:
        raise InputError(f"a directory has no attestation of its own: give its file, --envelope FILE, for {folder}")
    payload, signer = opened(envelope, key)
    statement = read_statement(payload)
    statement.refuse_expired(None if max_age is None else age_of(max_age, "--max-age"))
    statement.refuse_foreign(whole_digest(folder.resolve()))
    return statement, signer


def _of_version(
    target: str, key: Path, envelope: Path | None, max_age: str | None, tracking_uri: str
) -> tuple[Statement, str]:
    from flows.one_audit.attesting import verified_version
    from registry_models.attestation.signing import public_key
    from registry_models.registry.connecting import connect
    from registry_models.registry.versions import VersionReference, registered

    age = None if max_age is None else age_of(max_age, "--max-age")
    public_key(key)
    client = connect(tracking_uri)
    version = registered(VersionReference.parse(target).resolve(client), client)
    return verified_version(version, client, key, envelope=envelope, max_age=age)


def _line(statement: Statement, signer: str) -> str:
    predicate = statement.predicate
    audit = f"audit {str(predicate.get('auditId', ''))[:12]} of {statement.audited_at:%Y-%m-%d %H:%M} UTC"
    until = f", until {statement.expires:%Y-%m-%d %H:%M} UTC" if statement.expires else ""
    said = f"{visible(statement.name)}, {audit}, {float(predicate.get('coverage', 0.0)):.0%} covered"
    return f"{SIGNS[statement.outcome]} {statement.outcome}: {said} (valid{until}, signed by key {signer[:16]})"
