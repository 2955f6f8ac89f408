"""Logging, listing, snapshots and loading, on a real registry."""

from __future__ import annotations

import shutil
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow.tracking import MlflowClient
from torch import nn

from audits.errors import ArtifactError, InfrastructureError
from registry_models import attach_recipe, log_model
from registry_models.artifacts.loading import load_model
from registry_models.artifacts.snapshot import Snapshot, download_version, read_snapshot
from registry_models.recipes.recipe_files import read_recipe
from registry_models.registry.versions import RECIPE_TAG, VersionReference, list_versions
from tests.stores import linear_recipe, register_linear


class TiedNet(nn.Module):
    """Importable, with a tie and a buffer."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(width, width, bias=False)
        self.norm = nn.BatchNorm1d(width)
        self.second = nn.Linear(width, width, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.norm(self.first(x)))  # type: ignore[no-any-return]


def fetch(client: MlflowClient, reference: str, folder: Path) -> Snapshot:
    folder.mkdir()
    return download_version(VersionReference.parse(reference).resolve(client), client, folder)


@pytest.mark.parametrize(
    "text", ["models:/m", "models:/m/x", "m/1", "models:/m/1/2", "models:/m@", "models:/m@a b", "runs:/1/m"]
)
def test_what_is_no_reference_is_refused(text: str) -> None:
    with pytest.raises(ArtifactError, match="write models:/NAME/VERSION"):
        VersionReference.parse(text)


@pytest.mark.slow
def test_versions_are_found_by_number_alias_and_glob(client: MlflowClient) -> None:
    register_linear("team-a")
    register_linear("team-a")
    register_linear("other", pickled=True)
    client.set_registered_model_alias("team-a", "best", "2")
    assert VersionReference.parse("models:/team-a@best").resolve(client).version == 2
    assert [v.label for v in list_versions(client)] == ["other v1", "team-a v2", "team-a v1"]
    assert {v.name for v in list_versions(client, ["team-*"])} == {"team-a"}


@pytest.mark.parametrize("reference", ["models:/nothing/1", "models:/nothing@best"])
def test_an_absent_version_is_the_callers_mistake(client: MlflowClient, reference: str) -> None:
    with pytest.raises(ArtifactError, match="nothing"):
        VersionReference.parse(reference).resolve(client)


@pytest.mark.slow
def test_what_there_is_instead_is_said(client: MlflowClient) -> None:
    register_linear("char-gpt")
    client.set_registered_model_alias("char-gpt", "best", "1")
    for reference, words in (
        ("models:/chr-gpt/1", "did you mean 'char-gpt'"),
        ("models:/char-gpt/7", "it has versions 1, @best"),
        ("models:/char-gpt@worst", "it has versions 1, @best"),
    ):
        with pytest.raises(ArtifactError, match=words):
            VersionReference.parse(reference).resolve(client)


def test_an_unreachable_server_is_infrastructure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(InfrastructureError, match="does not answer"):
        VersionReference.parse("models:/m/1").resolve(MlflowClient(tracking_uri="http://127.0.0.1:9"))


@pytest.mark.slow
@pytest.mark.parametrize(("factory", "kind"), [(True, "eager"), (False, "pickle")])
def test_a_module_comes_back_whole(client: MlflowClient, tmp_path: Path, factory: bool, kind: str) -> None:
    mlflow.set_experiment("models")
    model = TiedNet()
    model(torch.randn(8, 4))
    model.eval()
    options = {"factory": TiedNet, "factory_args": {"width": 4}} if factory else {}
    log_model(model, "tied", recipe=linear_recipe(model), **options)
    snapshot = fetch(client, "models:/tied/1", tmp_path / "snapshot")
    assert (snapshot.artifact_kind, snapshot.recipe_source) == (kind, "version")
    loaded = load_model(
        snapshot.folder, snapshot.artifact_kind, (snapshot.code_folder,) if snapshot.code_folder else ()
    ).module
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert loaded.second.weight is loaded.first.weight
    assert snapshot.recipe_folder is not None
    assert read_recipe(snapshot.recipe_folder).ties == (("first.weight", "second.weight"),)


@pytest.mark.slow
def test_a_factory_that_builds_something_else_is_refused(client: MlflowClient) -> None:
    with pytest.raises(ArtifactError, match=r"do not fit .* missing weight, .*|missing"):
        log_model(TiedNet(), "bad", factory="torch.nn:Linear", factory_args={"in_features": 4, "out_features": 4})
    with pytest.raises(ArtifactError, match="has shape"):
        log_model(TiedNet(), "bad", factory=TiedNet, factory_args={"width": 5})
    assert list_versions(client) == []


def test_a_recipe_is_attached_to_a_registered_version(client: MlflowClient, tmp_path: Path) -> None:
    register_linear("late", with_recipe=False)
    assert fetch(client, "models:/late/1", tmp_path / "a").recipe_folder is None
    active = mlflow.get_experiment_by_name("models")
    uri = attach_recipe("models:/late/1", linear_recipe(nn.Linear(2, 1)), client=client)
    snapshot = fetch(client, "models:/late/1", tmp_path / "b")
    assert snapshot.recipe_source == uri
    assert snapshot.recipe_folder is not None
    read_recipe(snapshot.recipe_folder)
    assert active is not None


@pytest.mark.parametrize("uri", ["file:///etc", "https://127.0.0.1/x", "/etc/passwd", "s3://bucket/x"])
def test_a_recipe_tag_cannot_fetch_from_anywhere(client: MlflowClient, tmp_path: Path, uri: str) -> None:
    register_linear("tagged")
    client.set_model_version_tag("tagged", "1", RECIPE_TAG, uri)
    with pytest.raises(ArtifactError, match="of the same server only"):
        fetch(client, "models:/tagged/1", tmp_path / "a")


def test_the_digest_sees_content_and_not_the_download(client: MlflowClient, tmp_path: Path) -> None:
    register_linear("m")
    first = fetch(client, "models:/m/1", tmp_path / "a")
    second = fetch(client, "models:/m/1", tmp_path / "b")
    assert first.digest == second.digest
    (second.folder / "extra_files" / "audit" / "recipe.yaml").write_text("changed")
    assert read_snapshot(second.folder).digest != first.digest


@pytest.mark.slow
def test_broken_files_are_named(client: MlflowClient, tmp_path: Path) -> None:
    register_linear("m", pickled=True)
    register_linear("m")
    pickled = fetch(client, "models:/m/1", tmp_path / "a")
    weights = pickled.folder / "data" / "model.pth"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(ArtifactError, match=r"model\.pth is truncated or corrupt"):
        load_model(pickled.folder, "pickle")
    weights.write_bytes(b"not a pickle at all")
    with pytest.raises(ArtifactError, match="truncated or corrupt"):
        load_model(pickled.folder, "pickle")
    eager = fetch(client, "models:/m/2", tmp_path / "b")
    (eager.folder / "extra_files" / "audit" / "weights.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(ArtifactError, match=r"weights\.safetensors is missing, truncated or corrupt"):
        load_model(eager.folder, "eager")


@pytest.mark.slow
def test_links_and_foreign_folders_are_refused(client: MlflowClient, tmp_path: Path) -> None:
    register_linear("m")
    snapshot = fetch(client, "models:/m/1", tmp_path / "a")
    (snapshot.folder / "link").symlink_to("/etc/hostname")
    with pytest.raises(ArtifactError, match="symbolic link, link"):
        read_snapshot(snapshot.folder)
    with pytest.raises(ArtifactError, match="no MLmodel"):
        read_snapshot(tmp_path)


def test_code_that_would_replace_a_library_is_refused(tmp_path: Path) -> None:
    code = tmp_path / "code"
    (code / "torch").mkdir(parents=True)
    with pytest.raises(ArtifactError, match="'torch', which would replace"):
        load_model(tmp_path, "pickle", (code,))
    shutil.rmtree(code / "torch")
    (code / "json.py").write_text("")
    with pytest.raises(ArtifactError, match=r"'json\.py', which would replace"):
        load_model(tmp_path, "pickle", (code,))


def test_unsupported_kinds_say_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "MLmodel").write_text("flavors: {onnx: {data: model.onnx}}")
    with pytest.raises(ArtifactError, match=r"unsupported artifact kind: an ONNX graph has no module.*factory="):
        load_model(tmp_path, "unknown")


def test_another_store_than_mlflows_current_one_is_asked(client: MlflowClient, tmp_path: Path) -> None:
    register_linear("m")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'other.db'}")
    fetch(client, "models:/m/1", tmp_path / "a")
    assert mlflow.get_tracking_uri().endswith("other.db"), "MLflow's own settings are put back"
    assert not (tmp_path / "other.db").exists()
