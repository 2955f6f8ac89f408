"""A version's files in a private folder, their digest, artifact kind and recipe. Nothing is loaded here."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import mlflow.artifacts
from mlflow.tracking import MlflowClient

from audits.errors import ArtifactError, RecipeError
from registry_models.factory_files import FACTORY_FILE
from registry_models.recipe_files import FOLDER, RECIPE_FILE, load_yaml
from registry_models.versions import RECIPE_TAG, Version, registry_errors

#: Where recipes may be fetched from when a tag names them: the same server, nothing else.
_RECIPE_SCHEMES = ("runs:/", "models:/")

#: MLflow writes this file into downloads of a registered version; it is no part of the model.
_NOT_CONTENT = "registered_model_meta"

#: Largest recipe folder that a tag can bring in.
MAXIMUM_RECIPE_FOLDER_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Snapshot:
    """A version's files, as they were when they were downloaded.

    Attributes:
        folder: the model directory.
        digest: SHA-256 over the names and contents of its files.
        artifact_kind: ``eager``, ``pickle``, ``exported``, ``transformers`` or ``unknown``.
        recipe_folder: where the recipe's files are, or None.
        recipe_source: ``version``, the tag's URI, or ``none``.
        code_folder: the version's own ``code/`` folder, or None.
    """

    folder: Path
    digest: str
    artifact_kind: str
    recipe_folder: Path | None
    recipe_source: str
    code_folder: Path | None


def download_version(version: Version, client: MlflowClient, target: Path) -> Snapshot:
    """Download a registered version into ``target``, and the recipe its tag names, if any.

    Raises:
        ArtifactError: the version has no usable files, or its recipe tag names a forbidden place.
        InfrastructureError: the registry or the artifact store does not answer.
    """
    folder = target / "model"
    folder.mkdir(parents=True)
    with registry_errors(version.uri):
        _download(version.uri, folder, client)
    recipe_uri = version.tags.get(RECIPE_TAG)
    overlay = None
    if recipe_uri:
        if not recipe_uri.startswith(_RECIPE_SCHEMES):
            raise ArtifactError(
                f"tag {RECIPE_TAG}={recipe_uri!r}: recipes come from {' or '.join(_RECIPE_SCHEMES)} of "
                "the same server only"
            )
        overlay_root = target / "recipe"
        overlay_root.mkdir()
        with registry_errors(f"the recipe {recipe_uri}"):
            overlay = _download(recipe_uri, overlay_root, client)
        _files(overlay, limit=MAXIMUM_RECIPE_FOLDER_BYTES)
    return read_snapshot(folder, overlay=overlay, overlay_source=recipe_uri or "")


def read_snapshot(folder: Path, *, overlay: Path | None = None, overlay_source: str = "") -> Snapshot:
    """Describe the model directory ``folder``.

    Raises:
        ArtifactError: it is no MLflow model directory, or holds symbolic links.
    """
    if not (folder / "MLmodel").is_file():
        raise ArtifactError(f"{folder} is no MLflow model directory: it has no MLmodel file")
    files = _files(folder)
    try:
        described = load_yaml(folder / "MLmodel", aliases=True)
    except RecipeError as error:
        raise ArtifactError(str(error)) from error
    flavors = described.get("flavors") if isinstance(described, Mapping) else None
    if not isinstance(flavors, Mapping):
        raise ArtifactError("MLmodel names no flavors: the file is damaged")
    own = folder / "extra_files" / FOLDER
    if overlay is not None:
        recipe_folder: Path | None = overlay
    else:
        recipe_folder = own if (own / RECIPE_FILE).is_file() else None
    return Snapshot(
        folder=folder,
        digest=_digest(folder, files),
        artifact_kind=_artifact_kind(folder, flavors),
        recipe_folder=recipe_folder,
        recipe_source=overlay_source if overlay is not None else "version" if recipe_folder else "none",
        code_folder=_code_folder(folder, flavors),
    )


def _download(uri: str, target: Path, client: MlflowClient) -> Path:
    """Download from the client's own server: MLflow resolves ``models:/`` by its global URI, whatever it is given."""
    tracking_uri = mlflow.get_tracking_uri()
    try:
        mlflow.set_tracking_uri(client.tracking_uri)
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(target)))
    finally:
        mlflow.set_tracking_uri(tracking_uri)


def _artifact_kind(folder: Path, flavors: Mapping[str, Any]) -> str:
    if (folder / "extra_files" / FOLDER / FACTORY_FILE).is_file():
        return "eager"
    if "transformers" in flavors:
        return "transformers"
    if "pytorch" in flavors:
        data = folder / "data"
        return (
            "exported" if (data / "model.pt2").is_file() else "pickle" if (data / "model.pth").is_file() else "unknown"
        )
    return "unknown"


def _code_folder(folder: Path, flavors: Mapping[str, Any]) -> Path | None:
    for flavor in flavors.values():
        code = flavor.get("code") if isinstance(flavor, Mapping) else None
        if isinstance(code, str):
            path = (folder / code).resolve()
            if not path.is_relative_to(folder.resolve()):
                raise ArtifactError(f"MLmodel's code path {code!r} leaves the model's folder")
            if path.is_dir():
                return path
    return None


def _files(folder: Path, *, limit: int | None = None) -> list[Path]:
    files, total = [], 0
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise ArtifactError(f"the model's files hold a symbolic link, {path.relative_to(folder)}: refused")
        if path.is_file() and path.name != _NOT_CONTENT:
            files.append(path)
            total += path.stat().st_size
    if limit is not None and total > limit:
        raise ArtifactError(f"the recipe is larger than {limit // 2**20} MiB: refused")
    return files


def _digest(folder: Path, files: list[Path]) -> str:
    hasher = hashlib.sha256()
    for path in files:
        with path.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        hasher.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode())
    return hasher.hexdigest()[:32]
