"""A first look at a registered version: MLmodel and small files beside it, to choose what is audited. No weights."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from audits.errors import ArtifactError, RecipeError
from audits.naming import visible
from registry_models.artifacts.files_below import files_in
from registry_models.artifacts.flavours import NOTHING_TO_TRAIN, Look, Outside, outside, surely_torch
from registry_models.artifacts.mlmodel import MAXIMUM_BYTES, read_mlmodel
from registry_models.registry.artifact_places import Artifacts, version_artifacts
from registry_models.registry.versions import RECIPE_TAG, Version, registry_errors

#: What MLflow 2 writes on a run for every model it logged there.
_HISTORY = "mlflow.log-model.history"

#: Largest file beside MLmodel that is fetched for a look: MLflow keeps an ONNX graph's tensors in another file.
LARGEST = 16 * 2**20

#: Bytes at a file's beginning that are looked at.
BEGINNING = 64 * 2**10

#: Folders and files that are listed below a pyfunc's artifacts.
_FOLDERS, _FILES = 50, 2000


def look_at(version: Version, client: MlflowClient) -> Outside | None:
    """Return why a registered version is outside the audit; None where it is to be audited, or where nothing tells.

    To be called inside `registry_models.registry.artifact_places.at_home`.

    Raises:
        ArtifactError: it has no MLmodel file that can be read, and its run does not say either what it is.
        InfrastructureError: the registry or the artifact store does not answer.
    """
    with registry_errors(version.label), tempfile.TemporaryDirectory(prefix="gradaudit-look-") as temporary:
        try:
            found = outside(_look(version_artifacts(version, client), version, Path(temporary)))
            return None if found and found.flavour == NOTHING_TO_TRAIN and _tagged(version, client) else found
        except ArtifactError:
            if (flavours := _of_run(version, client)) is None:
                raise
            return outside(Look({"flavors": flavours}, (), lambda _: None))


def outside_of(folder: Path) -> Outside | None:
    """Return why a model directory is outside the audit; None where it is to be audited, or where nothing tells."""
    try:
        described = read_mlmodel(folder) or {}
        files = {path.relative_to(folder).as_posix() for path in files_in(folder)}
    except (ArtifactError, RecipeError, OSError):
        return None  # said better by whoever reads the whole

    def read(name: str) -> bytes | None:
        return _beginning(folder / name) if name in files else b""

    return outside(Look(described, files, read))


def _look(artifacts: Artifacts, version: Version, temporary: Path) -> Look:
    listed = artifacts.entries()
    sizes = {entry.name: entry.size for entry in listed if not entry.is_folder}
    if "MLmodel" not in sizes:
        raise ArtifactError(f"{version.label}: at {visible(artifacts.place)} there is no MLmodel file")
    if (sizes["MLmodel"] or 0) > MAXIMUM_BYTES:
        raise ArtifactError(f"{version.label}: its MLmodel file is too large")
    try:
        described = read_mlmodel(artifacts.file("MLmodel", temporary).parent) or {}
    except RecipeError as error:
        raise ArtifactError(f"{version.label}: {error}") from error
    if not surely_torch(described):
        for folder in (entry.name for entry in listed if entry.is_folder and entry.name != "code"):
            sizes |= _listed_below(artifacts, folder)

    def read(name: str) -> bytes | None:
        if name not in sizes:
            return b""
        if (path := artifacts.local(name)) is not None:
            return _beginning(path)
        if (sizes[name] or 0) > LARGEST:
            return None
        with tempfile.TemporaryDirectory(dir=temporary) as place:
            return _beginning(artifacts.file(name, Path(place)))

    return Look(described, sizes, read)


def _listed_below(artifacts: Artifacts, folder: str) -> dict[str, int | None]:
    """Files below a folder, as many as tell what is in it."""
    found: dict[str, int | None] = {}
    waiting = [folder]
    for _ in range(_FOLDERS):
        if not waiting or len(found) > _FILES:
            break
        for entry in artifacts.entries(waiting.pop(0)):
            if entry.is_folder:
                waiting.append(entry.name)
            else:
                found[entry.name] = entry.size
    return found


def _beginning(path: Path) -> bytes | None:
    try:
        with path.open("rb") as stream:
            return stream.read(BEGINNING)
    except OSError:
        return None


def _tagged(version: Version, client: MlflowClient) -> bool:
    """Whether somebody attached a recipe, to the version or to its model: then training it is meant."""
    return RECIPE_TAG in version.tags or RECIPE_TAG in (client.get_registered_model(version.name).tags or {})


def _of_run(version: Version, client: MlflowClient) -> Mapping[str, Any] | None:
    """The flavours that MLflow 2 noted on the run for a model whose files are gone; None where it did not."""
    if not version.run_id:
        return None
    try:
        logged = json.loads(client.get_run(version.run_id).data.tags.get(_HISTORY, "[]"))
    except (MlflowException, ValueError):
        return None
    for one in logged if isinstance(logged, list) else ():
        path = str(one.get("artifact_path") or "") if isinstance(one, dict) else ""
        if path and version.source.rstrip("/").endswith(f"/{path}") and isinstance(one.get("flavors"), dict):
            flavours: Mapping[str, Any] = one["flavors"]
            return flavours
    return None
