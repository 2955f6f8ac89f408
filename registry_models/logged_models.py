"""The LoggedModel behind a registered version: its page then links metric, run and version by itself."""

from __future__ import annotations

import re

from mlflow.entities import LoggedModelInput
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from registry_models.versions import Version

_LOGGED = re.compile(r"models:/(m-[0-9a-f]+)/?")
_COPY = re.compile(r"models:/(?P<name>[^/]+)/(?P<version>\d+)/?")

#: Copies of copies that are followed; nobody has more, and a circle must end.
_FOLLOWED = 20


def logged_model_of(client: MlflowClient, version: Version) -> str | None:
    """Return the id of the LoggedModel that a version was registered from; None where there is none.

    MLflow leaves it only in the version's source; the source of a copied version names the version it was copied from.
    """
    source = version.source
    for _ in range(_FOLLOWED):
        if found := _LOGGED.fullmatch(source):
            return found[1] if _exists(client, found[1]) else None
        copied = _COPY.fullmatch(source)
        if copied is None:
            return None
        try:
            source = client.get_model_version(copied["name"], copied["version"]).source or ""
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
    return None


def link_run(client: MlflowClient, run_id: str, model_id: str, tags: dict[str, str]) -> None:
    """Name the model as the run's input, and the run's verdict on the model."""
    client.log_inputs(run_id, models=[LoggedModelInput(model_id=model_id)])
    client.set_logged_model_tags(model_id, tags)


def _exists(client: MlflowClient, model_id: str) -> bool:
    try:
        client.get_logged_model(model_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    return True
