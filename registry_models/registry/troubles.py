"""What kept MLflow or its artifact store from doing what was asked: whose matter it is, and what cures it.

* A caller's mistake (there is no such thing): `ArtifactError`.
* Login, rights, path, certificate, room on the disk, a missing package: `SetupError`; repeating it ends the same.
* A server that does not answer, or answers with an error of its own: `InfrastructureError`, worth a retry.
"""

from __future__ import annotations

import os
import re

from mlflow.exceptions import MlflowException

from audits.errors import ArtifactError, GradauditError, InfrastructureError, SetupError
from audits.results.disk_troubles import chain_of, disk_trouble

#: MLflow's codes for "there is no such thing" and for "what you wrote cannot be".
_CALLER = {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "NOT_FOUND"}

#: MLflow's codes that stand for an HTTP status.
_CODES = {"UNAUTHENTICATED": 401, "CUSTOMER_UNAUTHORIZED": 401, "PERMISSION_DENIED": 403, "ENDPOINT_NOT_FOUND": 404}

#: How MLflow's clients and `requests` write the status of an answer that is none of MLflow's JSON.
_STATUS = re.compile(r"(?:error code (\d{3}) != |\b(\d{3}) (?:Client|Server) Error)")

_CERTIFICATE = re.compile(r"SSLError|CERTIFICATE_VERIFY_FAILED|certificate verify failed", re.IGNORECASE)
_REFUSED = re.compile(r"Connection refused|Name or service not known|Temporary failure in name resolution|timed out")
_OLD_TABLES = re.compile(r"out-of-date database schema|no such table", re.IGNORECASE)


def trouble(error: BaseException, what: str, doing: str = "") -> GradauditError:
    """Return the error that says what is wrong and what helps.

    Args:
        error: what MLflow, the network, the disk or an import raised.
        what: what was asked about.
        doing: what a user needs the right to, for an answer that says there is none.
    """
    text, status = " ".join(map(str, chain_of(error))), _status(error)
    if isinstance(error, ImportError):
        name = error.name or str(error)
        return SetupError(f"{what}: the package {name!r} is not installed here: install it where audits run")
    for matter in (disk_trouble(error, what), _database(text, what), _server(text, status, what, doing)):
        if matter is not None:
            return matter
    first = _first_line(error)
    if status == 404 and not isinstance(error, MlflowException):
        return ArtifactError(f"{what}: the artifact store has no such files (404): {first}")
    if isinstance(error, MlflowException):
        if error.error_code in _CALLER:
            return ArtifactError(f"{what}: {first}")
        return InfrastructureError(f"MLflow could not answer for {what}: {first}")
    return InfrastructureError(f"{what} could not be reached: {first}")


def _database(text: str, what: str) -> GradauditError | None:
    if "unable to open database file" in text:
        return SetupError(f"{what}: the database's file cannot be opened: is its folder there and writable?")
    if _OLD_TABLES.search(text):
        return SetupError(f"{what}: another version of MLflow made the database: run `mlflow db upgrade` on it")
    return None


def _server(text: str, status: int | None, what: str, doing: str) -> GradauditError | None:
    user = os.environ.get("MLFLOW_TRACKING_USERNAME", "")
    if _CERTIFICATE.search(text):
        return SetupError(
            f"{what}: the server's certificate is not trusted here: set MLFLOW_TRACKING_SERVER_CERT_PATH to your "
            "authority's certificates"
        )
    if status == 401 and user:
        return SetupError(f"{what}: the server refuses the login of {user!r} (401): check MLFLOW_TRACKING_PASSWORD")
    if status == 401:
        return SetupError(
            f"{what}: the server asks for a login (401): set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
            "MLFLOW_TRACKING_TOKEN"
        )
    if status == 403:
        who = f"the user {user!r}" if user else "this user"
        return SetupError(f"{what}: the server forbids it (403): {who} needs the right to {doing or 'read it'}")
    if status == 404 and "error code 404" in text:
        return SetupError(
            f"{what}: there is no MLflow at that address (404): is the tracking URI's path prefix missing or wrong?"
        )
    if "not in a valid JSON format" in text:
        return SetupError(
            f"{what}: what answers at that address is not MLflow: check the tracking URI and its path prefix, and "
            "whether a login page stands before it"
        )
    if found := _REFUSED.search(text):
        return InfrastructureError(f"{what}: the server does not answer ({found[0].lower()})")
    return None


def _status(error: BaseException) -> int | None:
    for each in chain_of(error):
        response = getattr(each, "response", None)
        if response is not None and isinstance(getattr(response, "status_code", None), int):
            return int(response.status_code)
        if found := _STATUS.search(str(each)):
            return int(found[1] or found[2])
        if isinstance(each, MlflowException) and each.error_code in _CODES:
            return _CODES[each.error_code]
    return None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}" if not lines else lines[0][:400]
