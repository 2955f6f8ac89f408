"""``gradaudit attest``: a version's newest audit, signed, beside the audit's run."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

from flows.arguments import refuse_settings
from flows.one_audit.attesting import attest_version
from flows.output import RESULTS, print_json
from flows.sandbox.private_folders import remove_stale
from flows.settings.environment import GradauditSettings
from registry_models.attestation.kept import FILE
from registry_models.attestation.signing import private_signer
from registry_models.registry.connecting import connect
from registry_models.registry.versions import VersionReference, registered


def run_attest(
    target: str,
    settings: GradauditSettings,
    key: Path,
    *,
    expires_in: datetime.timedelta | None,
    out: Path | None,
    as_json: bool,
) -> int:
    """Sign, keep, and print what was attested; return 0.

    Raises:
        InputError: there is no such version, it has no audit as it is now, or the key cannot sign.
        InfrastructureError: the registry, the results store or MLflow does not answer.
    """
    refuse_settings(settings)
    private_signer(key)  # a key that cannot sign is told before anything is looked up
    client = connect(settings.tracking_uri)
    version = registered(VersionReference.parse(target).resolve(client), client)
    remove_stale()
    envelope, statement = attest_version(version, client, settings, key, expires_in=expires_in)
    if out is not None:
        out.write_text(json.dumps(envelope, indent=2) + "\n", encoding="utf-8")
    run_id = statement.predicate["runId"]
    if as_json:
        print_json(envelope)
        return 0
    until = f", valid until {statement.predicate['expires']}" if statement.expires else ""
    print(
        f"attested: {version.label} is {statement.outcome} by audit {statement.predicate['auditId'][:12]}{until} "
        f"({FILE} in run {run_id})",
        file=RESULTS,
        flush=True,
    )
    return 0
