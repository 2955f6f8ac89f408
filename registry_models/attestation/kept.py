"""Where an attestation is kept: beside its audit's run."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow.tracking import MlflowClient

from audits.errors import InputError
from registry_models.attestation.signing import MAXIMUM_BYTES
from registry_models.registry.versions import Version, registry_errors

#: The artifact of the audit's run.
FILE = "attestation.dsse.json"


def keep(envelope: Mapping[str, Any], run_id: str, client: MlflowClient) -> None:
    """Write an envelope beside the run of its audit; a later one takes its place.

    Raises:
        ArtifactError: the run is gone.
        InfrastructureError: MLflow does not answer.
    """
    with tempfile.TemporaryDirectory(prefix="gradaudit-attest-") as folder:
        path = Path(folder) / FILE
        path.write_text(json.dumps(envelope, indent=2) + "\n", encoding="utf-8")
        with registry_errors(f"the run {run_id}", "write artifacts of this run"):
            client.log_artifact(run_id, str(path))


def kept(version: Version, client: MlflowClient) -> bytes:
    """Return the attestation of the audit that a version is marked with; what it says is for its signature to prove.

    Raises:
        InputError: there is none.
        InfrastructureError: MLflow does not answer.
    """
    none = f"{version.label} has no attestation: `gradaudit attest {version.uri} --key KEY` makes one"
    run_id = version.tags.get("audit.run_id", "")
    if not run_id:
        raise InputError(none)
    with tempfile.TemporaryDirectory(prefix="gradaudit-attest-") as folder:
        with registry_errors(f"the run {run_id}"):
            listed = {file.path: file for file in client.list_artifacts(run_id)}
            if FILE not in listed:
                raise InputError(none)
            if (listed[FILE].file_size or 0) > MAXIMUM_BYTES:
                raise InputError(f"the attestation of {version.label} is larger than {MAXIMUM_BYTES} bytes: refused")
            path = Path(client.download_artifacts(run_id, FILE, folder))
        return path.read_bytes()[: MAXIMUM_BYTES + 1]
