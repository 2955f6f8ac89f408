"""A version's files in a private folder, their digest, artifact kind and recipe. Nothing is loaded here."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from audits.errors import ArtifactError, RecipeError
from audits.naming import visible
from registry_models.artifacts.content_digest import content_digest, content_files, contents_of
from registry_models.artifacts.file_names import FACTORY_FILE
from registry_models.artifacts.files_below import files_in
from registry_models.artifacts.mlmodel import read_mlmodel
from registry_models.artifacts.version_parts import version_parts
from registry_models.recipes.recipe_names import FOLDER, RECIPE_FILE
from registry_models.recipes.recipe_sources import RecipeSource, Trust, copy_matching
from registry_models.registry.artifact_places import (
    Artifacts,
    artifacts_at,
    at_home,
    read_inside,
    still_the_same,
    version_artifacts,
)
from registry_models.registry.logged_models import logged_model_of, model_exists
from registry_models.registry.versions import RECIPE_TAG, Version, registry_errors

#: Where recipes may be fetched from when a tag names them: the same server, nothing else. ``runs://PROFILE@...`` would
#: be another server, and ``..`` another folder.
_RECIPE_URI = re.compile(r"runs:/[^/\s][^\s]*|models:/[^/].*", re.DOTALL)

#: Names of files that hold tensors and no module, where there is no MLmodel beside them.
_WEIGHTS = (".pth", ".pt", ".bin", ".safetensors", ".ckpt")

_MODEL_ID = re.compile(r"m-[0-9a-f]{1,64}")

#: Largest recipe folder that a tag can bring in.
MAXIMUM_RECIPE_FOLDER_BYTES = 2 * 2**30

#: Longest path below a model's folder that MLmodel may name.
MAXIMUM_NAME = 1000

#: Longest logged parameter that is passed on; optimizers' options are short.
MAXIMUM_PARAMETER = 500


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
        sources: every place that says something about the recipe, best first.
        run_params: parameters that the version's source run logged; an optimizer nobody declared is read off them.
        parts: digests of ``weights`` and ``files``, so that a retrained version and a rewritten one are told apart.
    """

    folder: Path
    digest: str
    artifact_kind: str
    recipe_folder: Path | None
    recipe_source: str
    code_folder: Path | None
    sources: tuple[RecipeSource, ...] = ()
    run_params: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, str] = field(default_factory=dict)

    def request(self) -> dict[str, Any]:
        """Return the part of a child's request that describes the version and its recipes."""
        sources = self.sources
        known = {source.path for source in sources}
        if self.recipe_folder is not None and self.recipe_folder not in known:  # put there by the caller
            sources = (RecipeSource(Trust.GIVEN, self.recipe_source, self.recipe_folder), *sources)
        return {
            "folder": str(self.folder),
            "artifact_kind": self.artifact_kind,
            "code_folder": self.code_folder and str(self.code_folder),
            "recipe_folder": self.recipe_folder and str(self.recipe_folder),
            "recipe_sources": [source.to_plain() for source in sources],
            "run_params": dict(self.run_params),
        }


def download_version(version: Version, client: MlflowClient, target: Path, *, recipes: Path | None = None) -> Snapshot:
    """Download a registered version into ``target``, and every recipe there is for it.

    Args:
        version: the version.
        client: client of its registry.
        target: an empty folder.
        recipes: the trusted recipe repository, a folder of YAML files, or None.

    Raises:
        ArtifactError: the version has no usable files, its recipe tag names a forbidden place, or a file of the
            recipe repository is broken: passed over silently, it would change verdicts.
        InfrastructureError: the registry or the artifact store does not answer.
    """
    folder = target / "model"
    folder.mkdir(parents=True)
    with registry_errors(version.label), at_home(client):
        artifacts = version_artifacts(version, client)
        folder = artifacts.download(folder)
        still_the_same(version, client)
        _check_complete(folder, version, artifacts)
        _check_model(folder, version, client)
    try:
        sources = [] if recipes is None else copy_matching(recipes, version.name, target / "recipes")
    except RecipeError as error:
        raise ArtifactError(f"the recipe repository is broken: {error}") from error
    recipe_uri = _recipe_tag(version, client)
    overlay = None
    if recipe_uri:
        overlay = _download_recipe(recipe_uri, target / "recipe", client)
        sources.append(RecipeSource(Trust.TAG, f"the tag {RECIPE_TAG}={recipe_uri}", overlay))
    snapshot = read_snapshot(folder, overlay=overlay, overlay_source=recipe_uri or "")
    return dataclasses.replace(
        snapshot, sources=(*sources, *snapshot.sources), run_params=_run_params(version.run_id, client)
    )


def artifact_bytes(version: Version, client: MlflowClient) -> int:
    """Return the bytes that `download_version` will bring, as far as the artifact store lists sizes.

    Raises:
        ArtifactError: the registry knows no such files.
        InfrastructureError: the registry or the artifact store does not answer.
    """
    with registry_errors(version.label), at_home(client):
        return version_artifacts(version, client).size()


def _recipe_tag(version: Version, client: MlflowClient) -> str | None:
    """The version's tag, else its model's."""
    if version.tags.get(RECIPE_TAG):
        return version.tags[RECIPE_TAG]
    with registry_errors(version.label):
        return (client.get_registered_model(version.name).tags or {}).get(RECIPE_TAG)


def _download_recipe(uri: str, target: Path, client: MlflowClient) -> Path:
    path = uri if uri.startswith("runs:") else read_inside(uri)[1]  # a model's name may hold anything
    if not _RECIPE_URI.fullmatch(uri) or ".." in path.split("/") or re.search(r"[\s%?#]", path):
        raise ArtifactError(f"tag {RECIPE_TAG}={uri!r}: recipes come from runs:/ or models:/ of the same server only")
    with registry_errors(f"the recipe {visible(uri)}"), at_home(client):
        artifacts = artifacts_at(uri, client)
        if artifacts.size() > MAXIMUM_RECIPE_FOLDER_BYTES:
            limit = MAXIMUM_RECIPE_FOLDER_BYTES // 2**20
            raise ArtifactError(f"the recipe {visible(uri)} is larger than {limit} MiB: refused")
        target.mkdir()
        folder = artifacts.download(target)
    _files(folder, limit=MAXIMUM_RECIPE_FOLDER_BYTES)
    inside = folder / "extra_files" / FOLDER  # another version as a whole
    return inside if not (folder / RECIPE_FILE).is_file() and (inside / RECIPE_FILE).is_file() else folder


def _run_params(run_id: str | None, client: MlflowClient) -> dict[str, str]:
    """Parameters of the source run; a run that is gone has none."""
    if not run_id:
        return {}
    try:
        return {str(k): str(v)[:MAXIMUM_PARAMETER] for k, v in client.get_run(run_id).data.params.items()}
    except MlflowException:
        return {}


def read_snapshot(folder: Path, *, overlay: Path | None = None, overlay_source: str = "") -> Snapshot:
    """Describe the model directory ``folder``.

    Raises:
        ArtifactError: it is no MLflow model directory, or holds symbolic links.
    """
    if not (folder / "MLmodel").is_file():
        raise ArtifactError(f"{folder} is not an MLflow model directory: it has no MLmodel file")
    files = _files(folder)
    try:
        described = read_mlmodel(folder)
    except RecipeError as error:
        raise ArtifactError(str(error)) from error
    flavors = described.get("flavors") if described is not None else None
    if not isinstance(flavors, Mapping):
        raise ArtifactError("MLmodel names no flavors: the file is damaged")
    own = folder / "extra_files" / FOLDER
    if overlay is not None:
        recipe_folder: Path | None = overlay
    else:
        recipe_folder = own if (own / RECIPE_FILE).is_file() else None
    contents, code_folder = contents_of(files), _code_folder(folder, flavors)
    return Snapshot(
        folder=folder,
        digest=content_digest(folder, contents),
        artifact_kind=_artifact_kind(folder, flavors),
        recipe_folder=recipe_folder,
        recipe_source=overlay_source if overlay is not None else "version" if recipe_folder else "none",
        code_folder=code_folder,
        sources=(RecipeSource(Trust.VERSION, "the version", own),) if (own / RECIPE_FILE).is_file() else (),
        parts=version_parts(folder, contents, code_folder),
    )


def _check_complete(folder: Path, version: Version, artifacts: Artifacts) -> None:
    """Say what is missing of an MLflow model, by the place where it is missing and not by that of its copy here."""
    if (folder / "MLmodel").is_file():
        return
    where = visible(artifacts.place)
    names = sorted(path.name for path in files_in(folder)) if folder.is_dir() else []
    weights = [name for name in names if name.endswith(_WEIGHTS)]
    if not names:
        raise ArtifactError(
            f"there is nothing at {where}, where the files of {version.label} should be: were they deleted"
        )
    if weights:
        raise ArtifactError(
            f"weights alone ({', '.join(weights[:3])}, at {where}) are what {version.label} holds, and weights name no "
            "module: register the model with registry_models.log_model(model, name, recipe=..., factory=...)"
        )
    raise ArtifactError(f"at {where} there is no MLmodel file: {version.label} is not an MLflow model")


def _check_model(folder: Path, version: Version, client: MlflowClient) -> None:
    """Refuse files that say they are another LoggedModel's of this server than the version was registered from.

    Files that were brought over from another server keep the id they had there, and no model here has it.
    """
    asked = logged_model_of(client, version)
    try:
        described = read_mlmodel(folder) if (folder / "MLmodel").is_file() else None
    except RecipeError:
        return  # said better by whoever reads the whole
    fetched = described.get("model_id") if described is not None else None
    if asked is None or not isinstance(fetched, str) or not _MODEL_ID.fullmatch(fetched) or fetched == asked:
        return
    if not model_exists(client, fetched):
        return
    raise ArtifactError(f"{version.label} was registered from {asked}, but its files are {visible(fetched)}'s: refused")


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
        if isinstance(code, str) and code:
            if "\0" in code or len(code) > MAXIMUM_NAME:
                raise ArtifactError("MLmodel names a code path that cannot be a path: the file is damaged")
            path = (folder / code).resolve()
            if not path.is_relative_to(folder.resolve()):
                raise ArtifactError(f"MLmodel's code path {code!r} leaves the model's folder")
            if path.is_dir():
                return path
    return None


def _files(folder: Path, *, limit: int | None = None) -> list[Path]:
    """The files that are content; MLflow writes one more beside MLmodel when it downloads a registered version."""
    files = content_files(folder)
    if limit is not None and sum(path.stat().st_size for path in files) > limit:
        raise ArtifactError(f"the recipe is larger than {limit // 2**20} MiB: refused")
    return files
