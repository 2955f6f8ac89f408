"""The callbacks that users paste, in real training runs of tiny models."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from mlflow.tracking import MlflowClient
from torch import nn

from audits.outcomes import Outcome
from audits.recipe.recipe import Recipe
from registry_models.recipes.recipe_files import read_recipe
from tests.registry_models.auditing import audited
from tests.registry_models.registry.test_versions import fetch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]  # of the frameworks about themselves


def stored_recipe(client: MlflowClient, reference: str, folder: Path) -> Recipe:
    snapshot = fetch(client, reference, folder)
    assert snapshot.recipe_folder is not None
    return read_recipe(snapshot.recipe_folder)


def fit(module: Any, callback: Any, **options: Any) -> None:
    lightning = pytest.importorskip("lightning", reason="the extra 'lightning' is not installed")
    data = torch.utils.data.TensorDataset(torch.randn(24, 4), torch.randint(0, 3, (24,)))
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
        **options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))


@pytest.mark.slow
def test_a_lightning_run_registers_what_it_trained(client: MlflowClient, tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="the extra 'lightning' is not installed")
    from registry_models.integrations.lightning import GradauditCallback
    from tests.registry_models.lightning_modules import Classifier

    mlflow.set_experiment("models")
    callback = GradauditCallback("classifier", factory=Classifier)
    fit(Classifier(), callback, gradient_clip_val=0.5, accumulate_grad_batches=2)
    assert callback.version is not None
    recipe = stored_recipe(client, "models:/classifier/1", tmp_path / "a")
    phase = recipe.phases[0]
    assert (phase.optimizer.class_path, phase.clip_grad_norm) == ("torch.optim.AdamW", 0.5)
    assert phase.optimizer.state, "the live optimizer's state"
    assert len(recipe.batch) == 2, "the micro-batches of the last step"
    report = audited(client, "models:/classifier/1", tmp_path / "b")
    assert report.outcome in (Outcome.PASS, Outcome.WARN), report.headline
    assert report.coverage == 1.0
    assert report.provenance["loss"] == "declared in the version"


@pytest.mark.slow
def test_a_lightning_gan_registers_both_phases(client: MlflowClient, tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="the extra 'lightning' is not installed")
    from registry_models.integrations.lightning import GradauditCallback
    from tests.registry_models.lightning_modules import Adversaries

    mlflow.set_experiment("models")
    fit(Adversaries(), GradauditCallback("gan"))
    report = audited(client, "models:/gan/1", tmp_path / "a")
    assert {row.phase for row in report.rows if row.phase} == {"optimizer-0", "optimizer-1"}
    assert report.outcome in (Outcome.PASS, Outcome.WARN), report.headline


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_transformers_run_registers_what_it_trained(client: MlflowClient, tmp_path: Path, accumulate: int) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra 'transformers' is not installed")
    pytest.importorskip("accelerate", reason="the extra 'transformers' is not installed")
    from registry_models.integrations.transformers import GradauditCallback
    from tests.registry_models.zoo import build

    mlflow.set_experiment("models")
    rows = [{"input_ids": torch.randint(5, 64, (8,))} for _ in range(16)]
    rows = [{**row, "labels": row["input_ids"].clone()} for row in rows]
    callback = GradauditCallback("gpt2")
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulate,
        learning_rate=1e-3,
        weight_decay=0.1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        model=build("GPT2LMHeadModel"), args=arguments, train_dataset=rows, callbacks=[callback]
    )
    trainer.train()
    recipe = stored_recipe(client, "models:/gpt2/1", tmp_path / "a")
    phase = recipe.phases[0]
    assert (phase.optimizer.class_path, phase.clip_grad_norm) == ("torch.optim.AdamW", 1.0)
    assert [group.options["weight_decay"] for group in phase.optimizer.groups] == [0.1, 0.0]
    assert all(group.options["lr"] > 0 for group in phase.optimizer.groups), "the schedule's end is not the step's rate"
    report = audited(client, "models:/gpt2/1", tmp_path / "b")
    assert report.outcome in (Outcome.PASS, Outcome.WARN), report.headline
    assert report.coverage == 1.0
    assert not (tmp_path / "b" / "model" / "data" / "model.pt2").exists()
    assert isinstance(callback.version, object)


def test_the_trainers_loss_is_the_recipes(tmp_path: Path) -> None:
    """Two micro-batches with unequal numbers of labels: the recipe's loss is the Trainer's, sum over all labels."""
    transformers = pytest.importorskip("transformers", reason="the extra 'transformers' is not installed")
    pytest.importorskip("accelerate", reason="the extra 'transformers' is not installed")
    from audits.live.subject import open_subject
    from registry_models.integrations.transformers import GradauditCallback
    from tests.registry_models.zoo import build

    model: nn.Module = build("LlamaForCausalLM")
    ids = torch.randint(5, 64, (4, 8))
    labels = ids.clone()
    labels[0, :5] = -100
    loader = [{"input_ids": ids[:2], "labels": labels[:2]}, {"input_ids": ids[2:], "labels": labels[2:]}]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), gradient_accumulation_steps=2, report_to=[], use_cpu=True
    )
    optimizer = torch.optim.AdamW(model.parameters())
    recipe = GradauditCallback("x").capture(arguments, model, optimizer, loader)
    count = int((labels[:, 1:] != -100).sum())
    with open_subject(model, recipe, device="cpu") as subject:
        subject.model.eval()
        measured = float(subject.loss(subject.phases[0]))
        expected = 0.0
        for batch in loader:
            logits = subject.model(input_ids=batch["input_ids"]).logits[:, :-1].reshape(-1, 64)
            targets = batch["labels"][:, 1:].reshape(-1)
            expected += float(nn.functional.cross_entropy(logits, targets, reduction="sum")) / count
    assert measured == pytest.approx(expected, rel=1e-5)
