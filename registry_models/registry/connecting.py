"""A client of the registry that is known to answer: what is wrong with its address is said before any work."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy
import sqlalchemy.exc
from mlflow.store.db.utils import create_sqlalchemy_engine
from mlflow.tracking import MlflowClient

from audits.errors import ArtifactError, InfrastructureError, SettingsError, SetupError
from registry_models.registry.versions import registry_errors


def connect(uri: str) -> MlflowClient:
    """Return a client of the registry at ``uri``, which has answered once.

    Raises:
        SettingsError: MLflow has no store at such an address.
        SetupError: a login, a right, a certificate, a path is in the way; the text has the cure.
        InfrastructureError: it does not answer.
    """
    if uri.startswith(("sqlite", "postgresql", "mysql", "mssql")):
        _answers(uri)
    try:
        with registry_errors(f"the registry {shown_uri(uri)}"):
            client = MlflowClient(tracking_uri=uri)
            client.search_registered_models(max_results=1)
    except ArtifactError as error:  # nothing particular was asked for: it is the address
        raise SettingsError(_reason(error, uri)) from error
    return client


def shown_uri(uri: str) -> str:
    """Return the URI without the password in it."""
    head, slashes, rest = uri.partition("://")
    login, at, place = rest.rpartition("@")
    return f"{head}{slashes}{login.partition(':')[0]}{at}{place}" if slashes else uri


def _answers(uri: str) -> None:
    """Try the database once: MLflow would try it fifteen times, for hours, and would make a SQLite file that is new."""
    if uri.startswith("sqlite"):
        path = sqlalchemy.make_url(uri).database or ":memory:"
        if path != ":memory:" and not path.startswith("file:") and not Path(path).is_file():
            raise SettingsError(
                f"there is no database {path}, so nothing is registered in it: check --tracking-uri and "
                "MLFLOW_TRACKING_URI"
            )
        return
    try:
        engine = create_sqlalchemy_engine(uri)
        try:
            engine.connect().close()
        finally:
            engine.dispose()
    except ImportError as error:
        raise SetupError(f"the database {shown_uri(uri)} needs the package {error.name!r}: install it") from error
    except sqlalchemy.exc.NoSuchModuleError as error:
        raise SettingsError(f"the tracking URI {shown_uri(uri)} names a database that is not known: {error}") from error
    except sqlalchemy.exc.SQLAlchemyError as error:
        first = (str(getattr(error, "orig", None) or error).strip().splitlines() or [""])[0]
        if any(word in first for word in ("authentication failed", "Access denied", "does not exist")):
            raise SetupError(f"the database {shown_uri(uri)} refuses: {first}") from error
        raise InfrastructureError(f"the database {shown_uri(uri)} does not answer: {first}") from error


def _reason(error: Exception, uri: str) -> str:
    text = str(error)
    if "filesystem tracking backend" in text:
        return (
            f"MLflow no longer opens the file store {uri}: set MLFLOW_ALLOW_FILE_STORE=true, or move it to a database "
            "by `mlflow migrate-filestore`"
        )
    return text
