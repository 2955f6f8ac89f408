"""A version's files, or why there are none: whose matter it is decides what becomes of the version."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from mlflow.tracking import MlflowClient

from audits.errors import ArtifactError, DiskError, GradauditError, InfrastructureError, SetupError
from audits.naming import visible
from registry_models.artifacts.snapshot import Snapshot, artifact_bytes, download_version
from registry_models.registry.versions import Version, answers

#: What the files themselves are to blame for, and no service: folders nested too deep, names and numbers beyond any
#: type. The next night would meet the same.
CONTENT = (RecursionError, UnicodeError, ArithmeticError, MemoryError)


@dataclasses.dataclass(frozen=True)
class Fetched:
    """What came of fetching.

    Attributes:
        snapshot: the files; None where there are none.
        refusal: why there are none.
        again: whether the version stays due: what is in its way can go without a change of the version.
    """

    snapshot: Snapshot | None
    refusal: str = ""
    again: bool = False


def fetch(
    version: Version,
    client: MlflowClient,
    folder: Path,
    *,
    recipes: Path | None,
    making_room: Callable[[int], object],
) -> Fetched:
    """Download a version; what is in the way of this one alone is its own result and stops no other.

    Args:
        version: the version.
        client: client of its registry.
        folder: an empty private folder.
        recipes: the trusted recipe repository, or None.
        making_room: called with the bytes to come, before they do.

    Raises:
        InfrastructureError: a retry may help, or it is in everybody's way: this host's disk, or a registry that does
            not answer.
    """
    try:
        making_room(artifact_bytes(version, client))
        return Fetched(download_version(version, client, folder, recipes=recipes))
    except ArtifactError as error:
        return Fetched(None, str(error))
    except Exception as error:
        if isinstance(error, InfrastructureError) and (
            isinstance(error, DiskError) or not isinstance(error, SetupError)
        ):
            raise
        if isinstance(error, CONTENT):
            return Fetched(None, f"the files could not be read: {type(error).__name__}: {visible(str(error))[:300]}")
        if not answers(client):
            if isinstance(error, GradauditError):
                raise
            raise InfrastructureError(f"{version.label}: {type(error).__name__}: {error}") from error
        said = str(error) if isinstance(error, GradauditError) else f"{type(error).__name__}: {error}"
        return Fetched(None, f"the files could not be fetched: {said}", again=True)
