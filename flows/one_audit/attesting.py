"""Attest a version's newest audit, and verify an attestation against the version's files as they are now."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from mlflow.tracking import MlflowClient

from audits.errors import InputError
from flows.choosing.due import is_present
from flows.choosing.due_keys import due_key, environment
from flows.one_audit.gate import Lookup
from flows.sandbox.private_folders import private_folder
from flows.settings.environment import GradauditSettings
from registry_models.artifacts.content_digest import STORED, whole_digest
from registry_models.artifacts.snapshot import download_version
from registry_models.attestation.kept import keep, kept
from registry_models.attestation.refusals import Refusal, RefusedAttestationError
from registry_models.attestation.signing import opened, sign
from registry_models.attestation.statement import Statement, read_statement, statement_of
from registry_models.registry.versions import Version


def attest_version(
    version: Version,
    client: MlflowClient,
    settings: GradauditSettings,
    key: Path,
    *,
    expires_in: datetime.timedelta | None = None,
) -> tuple[dict[str, Any], Statement]:
    """Sign the newest audit of the version as it is now and in this environment; keep the envelope beside its run.

    Returns:
        The envelope, and what it says.

    Raises:
        InputError: there is no such audit, its files have changed since, or the key cannot sign.
        InfrastructureError: the registry, the results store or MLflow does not answer.
    """
    lookup = Lookup(version, settings, None)
    report = lookup.newest()
    if report is None or report.run_id is None:
        raise InputError(
            f"{version.label} has no audit as it is now and in this environment: "
            f"`gradaudit gate {version.uri}` makes one"
        )
    digest = digest_of(version, client)
    if digest[:STORED] != report.identity.model_digest:
        raise InputError(
            f"the files of {version.label} have changed since audit {report.identity.audit_id[:12]}: "
            f"`gradaudit audit {version.uri}` audits them as they are"
        )
    expires = None if expires_in is None else datetime.datetime.now(datetime.UTC) + expires_in
    statement = statement_of(report, digest=digest, due_key=lookup.key, environment=lookup.environment, expires=expires)
    payload = json.dumps(statement, indent=1, sort_keys=True).encode()
    envelope = sign(payload, key)
    keep(envelope, report.run_id, client)
    return envelope, read_statement(payload)


def digest_of(version: Version, client: MlflowClient) -> str:
    """Return the SHA-256 of a registered version's files, downloaded into a private folder.

    Raises:
        ArtifactError: it has none that can be read.
        InfrastructureError: the registry or the artifact store does not answer.
    """
    with private_folder() as folder:
        return whole_digest(download_version(version, client, Path(folder)).folder)


def verified_version(
    version: Version,
    client: MlflowClient,
    key: Path,
    *,
    envelope: Path | None = None,
    max_age: datetime.timedelta | None = None,
) -> tuple[Statement, str]:
    """Return the valid statement about exactly this version and its files, and the id of the key that signed it.

    Args:
        version: the version.
        client: client of its registry.
        key: the public key that is believed.
        envelope: a file with the attestation; the one beside the audit's run otherwise.
        max_age: an older audit is not believed.

    Raises:
        RefusedAttestationError: it is not believed, with the reason.
        InputError: there is none.
        InfrastructureError: the registry does not answer.
    """
    payload, signer = opened(envelope if envelope is not None else kept(version, client), key)
    statement = read_statement(payload)
    statement.refuse_expired(max_age)
    statement.refuse_foreign(digest_of(version, client), version.uri)
    return statement, signer


def refuse_outdated(statement: Statement, version: Version, settings: GradauditSettings) -> None:
    """Refuse a valid statement about another recipe, other settings or another environment than the present ones.

    Raises:
        RefusedAttestationError: it is about such.
    """
    if statement.predicate.get("dueKey") != due_key(version, settings, settings.for_model(version.name)):
        text = "it is about another recipe, other settings or other waivers than those of now"
        raise RefusedAttestationError(Refusal.FOREIGN, text)
    present = environment(settings)
    attested = str(statement.predicate.get("environment", {}).get("description", ""))
    if not is_present(attested, present):
        text = f"it is about another environment ({attested}) than this one ({present})"
        raise RefusedAttestationError(Refusal.FOREIGN, text)
