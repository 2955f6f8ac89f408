"""What a registered version was made from: the versions it is a copy of, and the LoggedModel behind it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mlflow.entities import LoggedModelInput
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from audits.naming import read_reference
from registry_models.registry.versions import Version

_LOGGED = re.compile(r"models:/(m-[0-9a-f]+)/?")

#: Copies of copies that are followed; nobody has more, and a circle must end.
_FOLLOWED = 20


@dataclass(frozen=True)
class Origin:
    """What a version says it was made from.

    Attributes:
        copied: the versions it is a copy of, nearest first, as far as they exist.
        model_id: id of the LoggedModel at the end of them; None where there is none. The LoggedModel's page then links
            metric, run and version by itself.
        location: where that LoggedModel's files are.
        lost: the source of a copy whose original is gone, or has given its number to a later version; else empty.
    """

    copied: tuple[Version, ...] = ()
    model_id: str | None = None
    location: str = ""
    lost: str = ""


def origin_of(client: MlflowClient, version: Version) -> Origin:
    """Follow a version's source; the source of a copied version names the version it was copied from.

    MLflow names the LoggedModel only in the source. A model that is deleted and registered again counts from 1 again,
    so a version that is younger than its copy is another one.
    """
    copied: list[Version] = []
    source, created = version.source, version.created
    for _ in range(_FOLLOWED):
        if found := _LOGGED.fullmatch(source):
            location = _location(client, found[1])
            return Origin(tuple(copied), None if location is None else found[1], location or "")
        named = read_reference(source.rstrip("/"))
        if named is None or named.version is None:
            return Origin(tuple(copied))
        try:
            original = Version.of(client.get_model_version(named.name, str(named.version)))
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return Origin(tuple(copied), lost=source)
            raise
        if original.name != named.name or original.created > created:
            return Origin(tuple(copied), lost=source)
        copied.append(original)
        source, created = original.source, original.created
    return Origin(tuple(copied))


def logged_model_of(client: MlflowClient, version: Version) -> str | None:
    """Return the id of the LoggedModel that a version was registered from; None where there is none."""
    return origin_of(client, version).model_id


def model_exists(client: MlflowClient, model_id: str) -> bool:
    """Whether the server has a LoggedModel of this id."""
    return _location(client, model_id) is not None


def link_run(client: MlflowClient, run_id: str, model_id: str, tags: dict[str, str]) -> None:
    """Name the model as the run's input, and the run's verdict on the model."""
    client.log_inputs(run_id, models=[LoggedModelInput(model_id=model_id)])
    client.set_logged_model_tags(model_id, tags)


def _location(client: MlflowClient, model_id: str) -> str | None:
    """Return where a LoggedModel's files are; None where there is no such model, or none that this user may see."""
    try:
        return str(client.get_logged_model(model_id).artifact_location)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "PERMISSION_DENIED"):
            return None
        raise
