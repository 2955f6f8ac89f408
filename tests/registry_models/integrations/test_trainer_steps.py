"""transformers' own training step, from the callback through the registry: faults that people make, and right twins."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from mlflow.tracking import MlflowClient

from audits.outcomes import Outcome
from audits.report import AuditReport
from tests.registry_models.auditing import audited

os.environ.setdefault("HF_HUB_OFFLINE", "1")

transformers = pytest.importorskip("transformers", reason="the extra 'transformers' is not installed")
pytest.importorskip("accelerate", reason="the extra 'transformers' is not installed")

from registry_models.integrations.transformers import GradauditCallback  # noqa: E402
from tests.registry_models.integrations import trainers  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]  # of the framework about itself

#: What a canonical step cannot get wrong, and the Trainer can.
HANDLING = ("step.clipping", "step.count", "step.learning-rate", "step.mode")


def rows(unequal: bool = True) -> list[dict[str, torch.Tensor]]:
    """Token rows; unequal ones have other numbers of labels."""
    torch.manual_seed(0)
    found = []
    for index in range(16):
        ids = torch.randint(5, 64, (8,))
        labels = ids.clone()
        labels[: index % 7 if unequal else 0] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def tiny(dropout: float = 0.0) -> Any:
    """A causal model of one layer."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=32, attention_dropout=dropout, pad_token_id=0,
        )
    )  # fmt: skip


def arguments(folder: Path, **options: Any) -> Any:
    """Arguments of a short training: two micro-batches a step, clipped, scheduled."""
    return transformers.TrainingArguments(
        output_dir=str(folder / "out"), report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        **{"max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
           "learning_rate": 1e-3, "weight_decay": 0.1, "max_grad_norm": 0.5, **options},
    )  # fmt: skip


def trained(
    client: MlflowClient, folder: Path, cls: Any = transformers.Trainer, callbacks: Any = (), dropout: float = 0.0,
    loss: Any = None, **options: Any,
) -> AuditReport:  # fmt: skip
    """Train with nothing of gradaudit's but the callback, and audit what it registered."""
    mlflow.set_experiment("models")
    callback = GradauditCallback("model")
    trainer = cls(
        model=tiny(dropout), args=arguments(folder, **options), train_dataset=rows(),
        callbacks=[callback, *callbacks], compute_loss_func=loss,
    )  # fmt: skip
    trainer.train()
    assert callback.version is not None
    return audited(client, "models:/model/1", folder / "audit")


def assert_whole(report: AuditReport) -> None:
    assert report.outcome in (Outcome.PASS, Outcome.WARN), [(r.check, r.message) for r in report.findings]
    assert report.coverage == 1.0
    judged = {row.check for row in report.rows if row.outcome is Outcome.PASS}
    assert set(HANDLING) <= judged


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"dropout": 0.1}, id="plain"),
        pytest.param({"gradient_accumulation_steps": 1, "lr_scheduler_type": "cosine", "warmup_steps": 2}, id="cosine"),
        pytest.param({"label_smoothing_factor": 0.1}, id="smoothed"),
        pytest.param({"bf16": True}, id="bf16"),
        pytest.param({"fp16": True}, id="fp16"),
        pytest.param({"gradient_checkpointing": True}, id="checkpointed"),
        pytest.param({"neftune_noise_alpha": 5.0}, id="noise"),
        pytest.param({"cls": trainers.SharesTheCount}, id="own loss"),
        pytest.param({"cls": trainers.WeighsClasses}, id="class weights"),
        pytest.param({"cls": trainers.AddsATerm}, id="a term more"),
        pytest.param({"loss": trainers.counted_loss}, id="loss function"),
        pytest.param({"callbacks": [trainers.CountsSteps()]}, id="callback that looks"),
    ],
)
def test_a_right_trainer_is_audited_wholly(client: MlflowClient, tmp_path: Path, options: dict[str, Any]) -> None:
    assert_whole(trained(client, tmp_path, **options))


@pytest.mark.parametrize(
    ("options", "check", "named"),
    [
        pytest.param({"cls": trainers.IgnoresTheCount, "max_grad_norm": 0.0}, "step.gradient",
                     "IgnoresTheCount.compute_loss", id="count"),
        pytest.param({"cls": trainers.MeanOfMeans}, "step.gradient", "MeanOfMeans.compute_loss", id="mean of means"),
        pytest.param({"cls": trainers.IgnoresTheCount}, "step.clipping", "IgnoresTheCount.compute_loss",
                     id="count, clipped"),
        pytest.param({"cls": trainers.NeverClips}, "step.clipping", "NeverClips._clip_grad_norm", id="never clips"),
        pytest.param({"cls": trainers.ClipsByValue}, "step.clipping", "ClipsByValue._clip_grad_norm", id="by value"),
        pytest.param({"cls": trainers.LeavesEval, "dropout": 0.1}, "step.mode", "LeavesEval.compute_loss", id="eval"),
        pytest.param({"cls": trainers.DropsARow}, "step.gradient", "DropsARow.training_step", id="drops a row"),
        pytest.param({"callbacks": [trainers.ZeroesGradients()]}, "step.gradient-present",
                     "ZeroesGradients.on_pre_optimizer_step", id="zeroes"),
        pytest.param({"callbacks": [trainers.StepsAgain()]}, "step.count", "StepsAgain.on_optimizer_step", id="twice"),
        pytest.param({"callbacks": [trainers.SchedulesAgain()]}, "step.learning-rate", "SchedulesAgain.on_step_end",
                     id="schedule"),
        pytest.param({"callbacks": [trainers.ClipsWeights()]}, "update.outside-step", "ClipsWeights.on_optimizer_step",
                     id="weights"),
    ],
)  # fmt: skip
def test_a_fault_is_caught_and_its_method_named(
    client: MlflowClient, tmp_path: Path, options: dict[str, Any], check: str, named: str
) -> None:
    report = trained(client, tmp_path, **options)
    assert report.outcome is Outcome.FAIL, report.headline
    places = [row.where_to_look or "" for row in report.findings if row.check == check and row.outcome is Outcome.FAIL]
    assert places, [(row.check, row.message) for row in report.findings]
    assert all(named in place for place in places), places


def test_the_mean_of_means_is_called_by_its_name(client: MlflowClient, tmp_path: Path) -> None:
    report = trained(client, tmp_path, cls=trainers.MeanOfMeans)
    assert any("a mean of means" in row.message for row in report.findings if row.check == "step.gradient")
