"""peft models through the Trainer's callback and through `log_model`: what the configuration declares is judged."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from mlflow.tracking import MlflowClient

from audits import Recipe
from audits.outcomes import Outcome
from audits.report import AuditReport
from registry_models import log_model
from tests.registry_models.auditing import audited

os.environ.setdefault("HF_HUB_OFFLINE", "1")

transformers = pytest.importorskip("transformers", reason="the extra 'transformers' is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("accelerate", reason="the extra 'transformers' is not installed")

from registry_models.integrations.transformers import GradauditCallback  # noqa: E402
from tests.registry_models.integrations.test_trainer_steps import arguments, rows, tiny  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]  # of the frameworks about themselves

_LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def adapted(kind: str) -> Any:
    """A tiny causal model with adapters of a kind."""
    torch.manual_seed(0)
    configurations = {
        "lora": lambda: peft.LoraConfig(**_LORA),
        "dora": lambda: peft.LoraConfig(use_dora=True, **_LORA),
        "ia3": lambda: peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"],
                                      feedforward_modules=["down_proj"]),
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "saved": lambda: peft.LoraConfig(modules_to_save=["lm_head"], **_LORA),
        "two": lambda: peft.LoraConfig(**_LORA),
    }  # fmt: skip
    model = peft.get_peft_model(tiny(), configurations[kind]())
    if kind == "two":
        model.add_adapter("second", peft.LoraConfig(**_LORA))
        model.set_adapter("second")
    return model


def trained(client: MlflowClient, folder: Path, model: Any) -> AuditReport:
    mlflow.set_experiment("models")
    callback = GradauditCallback("model")
    transformers.Trainer(
        model=model, args=arguments(folder, max_steps=2), train_dataset=rows(), callbacks=[callback]
    ).train()
    assert callback.version is not None
    return audited(client, "models:/model/1", folder / "audit")


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "prompt", "saved", "two"])
def test_adapters_are_audited_as_their_configuration_says(client: MlflowClient, tmp_path: Path, kind: str) -> None:
    report = trained(client, tmp_path, adapted(kind))
    assert report.outcome in (Outcome.PASS, Outcome.WARN), [(r.check, r.message) for r in report.findings]
    assert report.coverage == 1.0
    judged = [row for row in report.rows if row.check == "registration.requires-grad"]
    assert {row.outcome for row in judged} == {Outcome.PASS}
    names = [row.parameter or "" for row in judged if "trainable" in row.message]
    assert names
    assert all("second" in name for name in names) or kind != "two"


def test_a_base_layer_that_trains_too_is_caught(client: MlflowClient, tmp_path: Path) -> None:
    model = adapted("lora")
    model.base_model.model.lm_head.weight.requires_grad_(True)
    report = trained(client, tmp_path, model)
    failed = [r for r in report.findings if r.check == "registration.requires-grad" and r.outcome is Outcome.FAIL]
    assert [row.parameter for row in failed] == ["base_model.model.lm_head.weight"], report.headline


def test_an_adapter_that_was_frozen_by_mistake_is_caught(client: MlflowClient, tmp_path: Path) -> None:
    model = adapted("saved")
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.requires_grad_(False)
    report = trained(client, tmp_path, model)
    failed = [r for r in report.findings if r.check == "registration.requires-grad" and r.outcome is Outcome.FAIL]
    assert ["modules_to_save" in (row.parameter or "") for row in failed] == [True], report.headline


def test_factors_at_their_zero_start_are_judged(client: MlflowClient, tmp_path: Path) -> None:
    """Fresh LoRA: B is zero, so A's gradient is too; both are judged away from there, through `log_model`."""
    mlflow.set_experiment("models")
    model = adapted("lora")
    ids = torch.randint(5, 64, (2, 8))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    recipe = Recipe.capture(model, batch={"input_ids": ids, "labels": ids.clone()}, loss="model", optimizer=optimizer)
    log_model(model, "model", recipe=recipe)
    report = audited(client, "models:/model/1", tmp_path / "audit")
    assert report.outcome in (Outcome.PASS, Outcome.WARN), [(r.check, r.message) for r in report.findings]
    assert report.coverage == 1.0
    judged = {r.parameter for r in report.rows if r.check == "gradient.finite-difference" and r.outcome is Outcome.PASS}
    assert any("lora_A" in (name or "") for name in judged)
    assert any("lora_B" in (name or "") for name in judged)


def test_merged_and_unmerged_are_one_function() -> None:
    model = adapted("dora")
    ids = torch.randint(5, 64, (2, 8))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.eval()
    apart = model(input_ids=ids).logits
    merged = model.merge_and_unload()(input_ids=ids).logits
    torch.testing.assert_close(merged, apart, rtol=1e-4, atol=1e-5)
