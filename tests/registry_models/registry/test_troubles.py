"""What is in the way is told from what waiting cures, each with its own cure."""

from __future__ import annotations

import errno

import pytest
import requests
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, PERMISSION_DENIED, RESOURCE_DOES_NOT_EXIST

from audits.errors import ArtifactError, DiskError, InfrastructureError, SetupError
from registry_models.registry.troubles import trouble
from registry_models.registry.versions import registry_errors


def answered(status: int) -> requests.HTTPError:
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError(f"{status} Client Error: for url: http://h/x", response=response)


def from_mlflow(status: int, body: str = "no") -> MlflowException:
    return MlflowException(
        f"API request to endpoint /x failed with error code {status} != 200. Response body: '{body}'"
    )


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (from_mlflow(401), SetupError, "MLFLOW_TRACKING_USERNAME"),
        (from_mlflow(403), SetupError, "needs the right to do this"),
        (MlflowException("denied", error_code=PERMISSION_DENIED), SetupError, "needs the right to do this"),
        (from_mlflow(404, "<!doctype html>"), SetupError, "path prefix missing or wrong"),
        (MlflowException("... not in a valid JSON format. Response body: '<html>'"), SetupError, "is not MLflow"),
        (requests.exceptions.SSLError("certificate verify failed"), SetupError, "MLFLOW_TRACKING_SERVER_CERT_PATH"),
        (ModuleNotFoundError("No module named 'boto3'", name="boto3"), SetupError, "'boto3' is not installed here"),
        (OSError(errno.ENOSPC, "No space left on device", "/scratch/m"), DiskError, "on the disk of /scratch/m"),
        (OSError(errno.EROFS, "Read-only file system", "/ro"), DiskError, "/ro is read-only"),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), DiskError, "may not use /root/x"),
        (MlflowException("failed: {'a': \"OSError(28, 'No space left on device')\"}"), DiskError, "TMPDIR"),
        (MlflowException("attempt to write a readonly database"), DiskError, "read-only"),
        (MlflowException("Detected out-of-date database schema"), SetupError, "mlflow db upgrade"),
        (answered(404), ArtifactError, "has no such files (404)"),
        (MlflowException("no", error_code=RESOURCE_DOES_NOT_EXIST), ArtifactError, "no"),
        (MlflowException("no", error_code=INVALID_PARAMETER_VALUE), ArtifactError, "no"),
        (from_mlflow(500), InfrastructureError, "could not answer"),
        (from_mlflow(503), InfrastructureError, "could not answer"),
        (answered(502), InfrastructureError, "could not be reached"),
        (requests.ConnectionError("Connection refused"), InfrastructureError, "does not answer (connection refused)"),
        (MlflowException("database is locked"), InfrastructureError, "locked"),
    ],
)  # fmt: skip
def test_every_trouble_has_its_kind_and_cure(error: Exception, kind: type[Exception], words: str) -> None:
    found = trouble(error, "m v1", "do this")
    assert type(found) is kind, found
    assert words in str(found)
    assert str(found).startswith("m v1") or "for m v1" in str(found)
    with pytest.raises(kind), registry_errors("m v1"):
        raise error


def test_what_a_trouble_came_from_counts() -> None:
    error = MlflowException("the download failed")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device", "/full/x")
    assert "/full/x" in str(trouble(error, "m v1"))


def test_a_wrong_password_is_told_from_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
    assert "refuses the login of 'ann' (401): check MLFLOW_TRACKING_PASSWORD" in str(trouble(from_mlflow(401), "m v1"))
    assert "the user 'ann' needs the right to" in str(trouble(from_mlflow(403), "m v1"))
