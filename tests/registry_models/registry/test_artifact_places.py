"""A version's files are fetched from where the registry has them, or refused; never by a URI made of a name."""

from __future__ import annotations

import shutil
from pathlib import Path

import mlflow
import pytest
from mlflow.tracking import MlflowClient
from torch import nn

from audits.errors import ArtifactError, InfrastructureError
from registry_models import attach_recipe
from registry_models.artifacts.snapshot import artifact_bytes, download_version
from registry_models.registry.artifact_places import artifacts_at
from registry_models.registry.logged_models import logged_model_of
from registry_models.registry.versions import RECIPE_TAG, Version, VersionReference
from tests.registry_models.registry.test_versions import fetch
from tests.stores import linear_recipe, register_linear


def resolved(client: MlflowClient, name: str, version: int = 1) -> Version:
    return VersionReference(name, version).resolve(client)


def model_id(version: Version) -> str:
    return version.source.removeprefix("models:/")


def fetched_id(client: MlflowClient, name: str, folder: Path, version: int = 1) -> str:
    folder.mkdir()
    snapshot = download_version(resolved(client, name, version), client, folder)
    (line,) = (text for text in (snapshot.folder / "MLmodel").read_text().splitlines() if text.startswith("model_id"))
    return line.removeprefix("model_id: ")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("models:/a\nb/1", ("a\nb", 1, None)),
        ("models:/@champ/2", ("@champ", 2, None)),
        ("models:/name@v/3", ("name@v", 3, None)),
        ("models:/name@v@live", ("name@v", None, "live")),
        ("models:/?q=1&b/1", ("?q=1&b", 1, None)),
        ("models:/a%2Fb#c /1", ("a%2Fb#c ", 1, None)),
    ],
)
def test_a_reference_keeps_the_name_as_it_is_written(text: str, named: tuple[str, int | None, str | None]) -> None:
    reference = VersionReference.parse(text)
    assert (reference.name, reference.version, reference.alias) == named


@pytest.mark.parametrize("text", ["models:/m/1\n", "models:/m@a\n", "models:/m/\u0661", "models:/a:b/1"])
def test_what_only_looks_like_a_reference_is_refused(text: str) -> None:
    with pytest.raises(ArtifactError, match="write models:/NAME/VERSION"):
        VersionReference.parse(text)


@pytest.mark.slow
@pytest.mark.parametrize("original", ["ab", "a\nb", "name@v", "?q=1&b"])
def test_a_copy_has_its_originals_files_or_is_refused(client: MlflowClient, tmp_path: Path, original: str) -> None:
    for name in dict.fromkeys(["ab", "?q=1", original]):
        register_linear(name)
    asked = resolved(client, original)
    if original == "?q=1&b":  # MLflow cannot copy it at all: its own URI names no version
        with pytest.raises(mlflow.MlflowException):
            client.copy_model_version(f"models:/{original}/1", "copy")
        return
    found = client.get_model_version(original, "1")
    client._get_registry_client().store.copy_model_version(found, "copy")
    copy = resolved(client, "copy")
    if original == "a\nb":
        with pytest.raises(ArtifactError, match=r"copy v1 says that it is a copy of a\\nb v1, but .* another model's"):
            fetch(client, "models:/copy/1", tmp_path / "refused")
        return
    assert logged_model_of(client, copy) == model_id(asked)
    assert fetched_id(client, "copy", tmp_path / "copy") == model_id(asked)


@pytest.mark.slow
def test_a_number_given_out_again_is_not_what_was_copied(client: MlflowClient, tmp_path: Path) -> None:
    """A model that is deleted and registered again counts from 1 again; the copy keeps the files of the first."""
    register_linear("original")
    first = model_id(resolved(client, "original"))
    client.copy_model_version("models:/original/1", "copy")
    client.delete_registered_model("original")
    register_linear("original")
    assert model_id(resolved(client, "original")) != first
    assert fetched_id(client, "copy", tmp_path / "copy") == first
    assert logged_model_of(client, resolved(client, "copy")) is None, "which LoggedModel it was is no longer said"


@pytest.mark.slow
def test_a_copy_of_a_lost_name_that_is_read_as_another_is_refused(client: MlflowClient, tmp_path: Path) -> None:
    register_linear("ab")
    register_linear("a\nb")
    client._get_registry_client().store.copy_model_version(client.get_model_version("a\nb", "1"), "copy")
    client.delete_model_version("a\nb", "1")
    with pytest.raises(ArtifactError, match=r"copy of models:/a\\nb/1, a name that MLflow reads as another"):
        fetch(client, "models:/copy/1", tmp_path / "refused")


@pytest.mark.slow
def test_files_of_another_model_of_this_server_are_refused(client: MlflowClient, tmp_path: Path) -> None:
    """Files from elsewhere keep the id they had there: those are taken."""
    register_linear("mine")
    register_linear("other")
    mine, other = (client.get_model_version_download_uri(name, "1") for name in ("mine", "other"))
    folders = [Path(place.removeprefix("file://")) for place in (mine, other)]
    described = (folders[0] / "MLmodel").read_text()
    own, foreign = model_id(resolved(client, "mine")), "m-" + "0" * 32
    (folders[0] / "MLmodel").write_text(described.replace(own, foreign))
    assert fetched_id(client, "mine", tmp_path / "moved") == foreign
    shutil.copy(folders[1] / "MLmodel", folders[0] / "MLmodel")
    with pytest.raises(
        ArtifactError, match=f"registered from {own}, but its files are {model_id(resolved(client, 'other'))}'s"
    ):
        fetch(client, "models:/mine/1", tmp_path / "refused")


@pytest.mark.slow
def test_a_version_replaced_meanwhile_is_neither_fetched_nor_marked(client: MlflowClient, tmp_path: Path) -> None:
    register_linear("m")
    asked = resolved(client, "m")
    client.delete_registered_model("m")
    register_linear("m")
    with pytest.raises(InfrastructureError, match="m v1 was replaced by another version"):
        download_version(asked, client, tmp_path)


@pytest.mark.parametrize(("path", "twin"), [("a\nb", "ab"), ("c#1", "c"), ("d?e", "d")])
def test_a_run_path_that_mlflow_reads_as_another_is_refused(
    client: MlflowClient, tmp_path: Path, path: str, twin: str
) -> None:
    run = client.create_run(client.get_experiment_by_name("models").experiment_id)
    for name in (path, twin):
        (tmp_path / name).mkdir()
        (tmp_path / name / "MLmodel").write_text("flavors: {}\n")
        client.log_artifacts(run.info.run_id, str(tmp_path / name), name)
    client.create_registered_model("m")
    for name in (path, twin):
        client.create_model_version("m", f"runs:/{run.info.run_id}/{name}", run_id=run.info.run_id)
    with pytest.raises(ArtifactError, match="which MLflow reads as"):
        fetch(client, "models:/m/1", tmp_path / "refused")
    assert fetch(client, "models:/m/2", tmp_path / "taken").folder.name == twin


def test_sizes_and_files_are_found_behind_every_kind_of_reference(client: MlflowClient, tmp_path: Path) -> None:
    register_linear("name@v")
    version = resolved(client, "name@v")
    client.set_registered_model_alias("name@v", "live", "1")
    size = artifact_bytes(version, client)
    assert size > 1000
    for place in (
        version.source,
        version.uri,
        "models:/name@v@live",
        client.get_model_version_download_uri("name@v", "1"),
    ):
        artifacts = artifacts_at(place, client)
        assert artifacts.size() == size, place
        folder = tmp_path / str(abs(hash(place)))
        folder.mkdir()
        assert (artifacts.download(folder) / "MLmodel").is_file(), place


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a\nb", "name@v", "@champ", "?q=1&b", "100%"])
def test_recipes_are_attached_to_and_taken_from_odd_names(client: MlflowClient, tmp_path: Path, name: str) -> None:
    register_linear(name, with_recipe=False)
    register_linear("plain", with_recipe=False)
    uri = attach_recipe(f"models:/{name}/1", linear_recipe(nn.Linear(2, 1)), client=client)
    assert fetch(client, f"models:/{name}/1", tmp_path / "attached").recipe_source == uri
    register_linear(name)
    client.set_model_version_tag("plain", "1", RECIPE_TAG, f"models:/{name}/2")
    snapshot = fetch(client, "models:/plain/1", tmp_path / "borrowed")
    assert snapshot.recipe_folder is not None
    assert (snapshot.recipe_folder / "recipe.yaml").is_file()
