"""Versions nobody gave a recipe: what is read off them, what is assumed, and that it is said."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow.tracking import MlflowClient
from torch import nn

from audits.outcomes import Outcome
from registry_models.inference.optimizers import choose_optimizer
from tests.registry_models.artifacts.test_artifact_kinds import TiedDropout, log_exported
from tests.registry_models.auditing import audited, shown
from tests.registry_models.registry.test_versions import TiedNet

os.environ.setdefault("HF_HUB_OFFLINE", "1")


class Embedded(nn.Module):
    """Whole numbers in."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, tokens: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.head(self.table(tokens).mean(1)) * scale}


def log_pickled(model: nn.Module, name: str, **options: object) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mlflow.pytorch.log_model(
            model,
            name="m",
            registered_model_name=name,
            serialization_format="pickle",
            pip_requirements=["torch"],
            **options,
        )


def test_an_input_example_is_enough(client: MlflowClient, tmp_path: Path) -> None:
    mlflow.set_experiment("models")
    log_pickled(TiedNet(), "m", input_example=torch.randn(6, 4).numpy())
    report = audited(client, "models:/m/1", tmp_path / "a")
    assert report.outcome is Outcome.INCONCLUSIVE
    assert report.coverage == 0.0
    assert report.provenance["batch"] == "assumed: MLflow's input example"
    assert report.provenance["loss"] == "assumed: a fixed random projection of the output"
    assert report.provenance["optimizer"] == "assumed: SGD at 0.01"
    assert report.counts["fail"] == 0
    gradient = [row for row in report.rows if row.check == "gradient.finite-difference" and row.outcome.resolved]
    assert {row.parameter for row in gradient} == {"first.weight", "norm.weight", "norm.bias"}
    assert all("loss assumed" in row.message for row in gradient)
    assert "Cure: registry_models.attach_recipe" in shown(report, "recipe.declared")[0]


def test_a_single_row_is_widened_for_batch_norm(client: MlflowClient, tmp_path: Path) -> None:
    mlflow.set_experiment("models")
    log_pickled(TiedNet().eval(), "m", input_example=torch.randn(1, 4).numpy())
    report = audited(client, "models:/m/1", tmp_path / "a")
    assert report.provenance["batch"] == "assumed: MLflow's input example, repeated to 4 rows"
    assert report.counts["fail"] == 0


def test_a_signature_is_enough(client: MlflowClient, tmp_path: Path) -> None:
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    mlflow.set_experiment("models")
    specs = [TensorSpec(np.dtype("int64"), (-1, 3), "tokens"), TensorSpec(np.dtype("float32"), (-1, 1), "scale")]
    log_pickled(Embedded(), "m", signature=ModelSignature(inputs=Schema(specs)))
    report = audited(client, "models:/m/1", tmp_path / "a")
    assert report.provenance["batch"] == "assumed: random tensors of the signature"
    assert report.counts["fail"] == 0
    assert report.counts["pass"] > 20


def test_an_exported_graph_brings_its_sample_inputs(client: MlflowClient, tmp_path: Path) -> None:
    mlflow.set_experiment("models")
    log_exported(TiedDropout().train(), "m", torch.randn(6, 4))
    report = audited(client, "models:/m/1", tmp_path / "a")
    assert report.counts["fail"] == 0
    assert "exported graph: custom backward not visible" in report.headline
    assert "factory=" in report.headline, "the one-line cure"
    rows = [row for row in report.rows if row.family == "gradient" and row.outcome is not Outcome.SKIPPED]
    assert rows
    assert all("exported graph: custom backward not visible" in row.message for row in rows)
    assert "'train' is baked in" in shown(report, "model.whole")[0]
    assert "first.weight = second.weight" in shown(report, "model.whole")[0]


def test_without_anything_the_cure_is_named(client: MlflowClient, tmp_path: Path) -> None:
    mlflow.set_experiment("models")
    log_pickled(TiedNet(), "m")
    report = audited(client, "models:/m/1", tmp_path / "a")
    assert report.outcome is Outcome.INCONCLUSIVE
    assert "attach_recipe" in report.headline
    assert "input_example" in report.headline


def test_the_source_runs_parameters_name_the_optimizer(client: MlflowClient, tmp_path: Path) -> None:
    mlflow.set_experiment("models")
    with mlflow.start_run():
        mlflow.log_params({"optimizer_name": "Adam", "lr": 0.002, "betas": "(0.8, 0.9)", "eps": "1e-07"})
        log_pickled(TiedNet(), "m", input_example=torch.randn(6, 4).numpy())
    report = audited(client, "models:/m/1", tmp_path / "a")
    said = "the source run's parameters (Adam: lr=0.002, betas=(0.8, 0.9), eps=1e-07)"
    assert report.provenance["optimizer"] == said
    assert "optimizer" not in shown(report, "recipe.declared")[0].split("Cure")[0]


@pytest.mark.parametrize(
    ("params", "name", "assumed"),
    [
        ({}, "SGD", True),
        ({"optimizer": "torch.optim.AdamW", "learning_rate": "0.1"}, "AdamW", False),
        ({"optimizer_name": "Lion", "lr": "0.1"}, "SGD", True),
        ({"optimizer_name": "Adam", "lr": "__import__('os').system('true')"}, "Adam", False),
        ({"optimizer_name": "Adam", "lr": "-1"}, "SGD", True),
        ({"optim": "adamw_torch", "adam_beta1": "0.7", "learning_rate": "5e-5"}, "AdamW", False),
    ],
)
def test_optimizers_are_read_off_parameters(params: dict[str, str], name: str, assumed: bool) -> None:
    chosen = choose_optimizer(TiedNet(), params)
    assert (type(chosen.optimizer).__name__, chosen.assumed) == (name, assumed)


def test_transformers_arguments_keep_decay_off_norms_and_biases() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    params = {"optim": "adamw_torch", "weight_decay": "0.1", "adam_beta1": "0.9", "max_grad_norm": "1.0"}
    chosen = choose_optimizer(model, params)
    assert [len(group["params"]) for group in chosen.optimizer.param_groups] == [1, 3]
    assert [group["weight_decay"] for group in chosen.optimizer.param_groups] == [0.1, 0.0]
    assert chosen.clip_grad_norm == 1.0


@pytest.mark.end_to_end
@pytest.mark.filterwarnings("ignore")
def test_a_lightning_module_from_autolog_needs_nothing(client: MlflowClient, tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="the extra 'lightning' is not installed")
    from tests.registry_models.planted_lightning import register_autologged

    mlflow.set_experiment("models")
    register_autologged("autologged")
    report = audited(client, "models:/autologged/1", tmp_path / "a")
    assert report.outcome in (Outcome.PASS, Outcome.WARN), report.headline
    assert report.coverage == 1.0
    assert report.provenance["loss"] == "the module's own training_step"
    assert report.provenance["optimizer"] == "the module's own configure_optimizers (AdamW)"
    assert report.provenance["batch"].startswith("assumed: random tensors of the signature")


@pytest.mark.filterwarnings("ignore")
def test_all_optimizers_of_a_gan_are_audited(client: MlflowClient, tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="the extra 'lightning' is not installed")
    from tests.registry_models.lightning_modules import Adversaries

    mlflow.set_experiment("models")
    log_pickled(Adversaries(), "gan")
    report = audited(client, "models:/gan/1", tmp_path / "a")
    assert {row.phase for row in report.rows if row.phase} == {"optimizer-0", "optimizer-1"}
    assert report.coverage == 1.0
    assert report.counts["fail"] == 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [
        "GPT2LMHeadModel",
        "BertForMaskedLM",
        "DebertaV2ForSequenceClassification",
        "T5ForConditionalGeneration",
        "ViTForImageClassification",
        "DistilBertForQuestionAnswering",
        "LlamaForCausalLM",
    ],
)
def test_transformers_are_audited_with_their_own_loss(client: MlflowClient, tmp_path: Path, name: str) -> None:
    pytest.importorskip("transformers", reason="the extra 'transformers' is not installed")
    from tests.registry_models.zoo import register

    mlflow.set_experiment("models")
    register(name, "m")
    report = audited(client, "models:/m/1", tmp_path / "a")
    assert report.provenance["loss"] == "the model's own loss"
    assert report.counts["fail"] == 0, report.headline
    parameters = {row.parameter for row in report.rows if row.check == "gradient.finite-difference"}
    judged = {r.parameter for r in report.rows if r.check == "gradient.finite-difference" and r.outcome.resolved}
    assert len(judged) >= 0.9 * len(parameters)
    assert report.coverage == 0.0, "nobody declared the optimizer"
