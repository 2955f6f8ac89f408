"""Every artifact kind, logged as users log it and loaded as the audit's child does."""

from __future__ import annotations

import warnings
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow.tracking import MlflowClient
from torch import nn

from audits.errors import ArtifactError
from registry_models import log_model
from registry_models.artifacts.file_names import WEIGHTS_FILE
from registry_models.artifacts.loading import load_model
from registry_models.artifacts.snapshot import Snapshot
from tests.registry_models.auditing import in_a_child
from tests.registry_models.registry.test_versions import TiedNet, fetch
from tests.stores import linear_recipe


class Branching(nn.Module):
    """What `torch.export` cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * (2.0 if float(x.sum()) > 0 else 1.0)  # type: ignore[no-any-return]


class TiedDropout(TiedNet):
    """A tie, a norm and dropout: what exporting splits and bakes in."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


def loaded(client: MlflowClient, name: str, folder: Path) -> tuple[Snapshot, nn.Module]:
    snapshot = fetch(client, f"models:/{name}/1", folder)
    code = () if snapshot.code_folder is None else (snapshot.code_folder,)
    return snapshot, load_model(snapshot.folder, snapshot.artifact_kind, code).module


def log_exported(model: nn.Module, name: str, example: torch.Tensor, **options: object) -> None:
    """MLflow's own call, with its default format."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mlflow.pytorch.log_model(
            model,
            name="m",
            registered_model_name=name,
            input_example=example.numpy(),
            pip_requirements=["torch"],
            **options,
        )


@pytest.mark.end_to_end
def test_a_factory_writes_pt2_where_export_works(client: MlflowClient, tmp_path: Path) -> None:
    mlflow.set_experiment("models")
    model = nn.Linear(2, 1)
    options = {"factory": "torch.nn:Linear", "factory_args": {"in_features": 2, "out_features": 1}}
    log_model(model, "linear", recipe=linear_recipe(model), **options)
    snapshot, module = loaded(client, "linear", tmp_path / "a")
    assert snapshot.artifact_kind == "eager"
    assert (snapshot.folder / "data" / "model.pt2").is_file()
    assert not (snapshot.folder / "data" / "model.pth").exists()
    assert not list(snapshot.folder.rglob(WEIGHTS_FILE)), "the archive brings the weights"
    assert type(module) is nn.Linear
    assert torch.equal(module.weight, model.weight)
    assert model.training, "exported in eval mode, given back in train mode"


@pytest.mark.slow
def test_tied_weights_come_back_tied_from_pt2(client: MlflowClient, tmp_path: Path) -> None:
    mlflow.set_experiment("models")
    model = TiedNet()
    log_model(model, "tied", factory=TiedNet, factory_args={"width": 4}, input_example=torch.randn(6, 4).numpy())
    snapshot, module = loaded(client, "tied", tmp_path / "a")
    assert (snapshot.folder / "data" / "model.pt2").is_file()
    assert module.second.weight is module.first.weight
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, module.state_dict()[name]), name


@pytest.mark.slow
def test_a_factory_writes_safetensors_where_export_does_not(client: MlflowClient, tmp_path: Path) -> None:
    mlflow.set_experiment("models")
    model = Branching()
    log_model(model, "branching", recipe=linear_recipe(model), factory=Branching)
    snapshot, module = loaded(client, "branching", tmp_path / "a")
    assert snapshot.artifact_kind == "eager"
    assert list(snapshot.folder.rglob(WEIGHTS_FILE))
    assert torch.equal(module.layer.weight, model.layer.weight)


def test_an_exported_graph_says_what_exporting_did(client: MlflowClient, tmp_path: Path) -> None:
    mlflow.set_experiment("models")
    log_exported(TiedDropout().train(), "graph", torch.randn(6, 4))
    snapshot = fetch(client, "models:/graph/1", tmp_path / "a")
    assert snapshot.artifact_kind == "exported"
    graph = load_model(snapshot.folder, "exported").exported
    assert graph is not None
    assert graph.mode == "train"
    assert graph.ties == (("first.weight", "second.weight"),)
    names = [name for name, _ in graph.module.named_parameters()]
    assert sorted(names) == ["first.weight", "norm.bias", "norm.weight"]
    assert len(graph.notes) == 2
    graph.module.train()
    graph.module.eval()


def test_a_baked_batch_size_is_noticed(client: MlflowClient, tmp_path: Path) -> None:
    mlflow.set_experiment("models")
    log_exported(nn.Linear(2, 1).eval(), "single", torch.randn(1, 2))
    snapshot = fetch(client, "models:/single/1", tmp_path / "a")
    graph = load_model(snapshot.folder, "exported").exported
    assert graph is not None
    assert (graph.batch_size, graph.mode) == (1, None)
    assert graph.arguments is not None


class Positioned(nn.Module):
    """Makes a tensor of its own, on a device that exporting bakes in."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x + torch.arange(4, device=x.device))  # type: ignore[no-any-return]


def test_a_baked_device_is_kept(client: MlflowClient, tmp_path: Path) -> None:
    mlflow.set_experiment("models")
    log_exported(Positioned(), "m", torch.randn(6, 4))
    snapshot = fetch(client, "models:/m/1", tmp_path / "a")
    graph = load_model(snapshot.folder, "exported").exported
    assert graph is not None
    assert graph.device == "cpu"
    assert any("'cpu' is baked in" in note for note in graph.notes)


def test_torchscript_is_no_supported_kind(client: MlflowClient, tmp_path: Path) -> None:
    mlflow.set_experiment("models")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Linear(2, 1))
        mlflow.pytorch.log_model(
            scripted,
            name="m",
            registered_model_name="script",
            serialization_format="pickle",
            pip_requirements=["torch"],
        )
    snapshot = fetch(client, "models:/script/1", tmp_path / "a")
    with pytest.raises(ArtifactError, match="unsupported artifact kind: TorchScript"):
        load_model(snapshot.folder, snapshot.artifact_kind)


def test_a_corrupt_graph_is_named(client: MlflowClient, tmp_path: Path) -> None:
    mlflow.set_experiment("models")
    log_exported(nn.Linear(2, 1), "m", torch.randn(4, 2))
    snapshot = fetch(client, "models:/m/1", tmp_path / "a")
    archive = snapshot.folder / "data" / "model.pt2"
    archive.write_bytes(archive.read_bytes()[:400])
    with pytest.raises(ArtifactError, match=r"model\.pt2 is missing, truncated or corrupt"):
        load_model(snapshot.folder, "exported")


def test_an_archive_that_would_expand_is_refused(tmp_path: Path) -> None:
    import zipfile

    (tmp_path / "data").mkdir()
    with zipfile.ZipFile(tmp_path / "data" / "model.pt2", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data/weights/weight_0", b"\0" * 2**26)
    with pytest.raises(ArtifactError, match=r"would expand from [\d,]+ to 67,108,864 bytes: refused"):
        load_model(tmp_path, "exported")


@pytest.mark.end_to_end
@pytest.mark.parametrize("kind", ["exported", "lightning", "transformers"])
@pytest.mark.filterwarnings("ignore")
def test_every_kind_is_audited_without_mlflow(client: MlflowClient, tmp_path: Path, kind: str) -> None:
    mlflow.set_experiment("models")
    if kind == "exported":
        log_exported(TiedDropout(), "m", torch.randn(6, 4))
    elif kind == "lightning":
        pytest.importorskip("lightning", reason="the extra 'lightning' is not installed")
        from tests.registry_models.planted_lightning import register_adversaries

        register_adversaries("m")
    else:
        pytest.importorskip("transformers", reason="the extra 'transformers' is not installed")
        from tests.registry_models.zoo import register

        register("GPT2LMHeadModel", "m")
    report = in_a_child(client, "models:/m/1", tmp_path / "a")
    assert report.counts["fail"] == 0, report.headline
    assert report.counts["pass"] > 20, report.headline
    assert ("exported graph" in report.headline) == (kind == "exported"), "the limits travel with the answer"
