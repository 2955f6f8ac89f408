"""Loops written with accelerate, stored as step functions: faults that people make, and right twins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from mlflow.tracking import MlflowClient

from audits import Recipe, audit
from audits.outcomes import Outcome
from registry_models import log_model
from tests.registry_models.auditing import audited

pytest.importorskip("accelerate", reason="the extra 'transformers' is not installed")

from tests.registry_models.integrations import loops

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]


def captured(step: Any, **options: Any) -> tuple[torch.nn.Module, Recipe]:
    torch.manual_seed(0)
    model = loops.Net()
    batches = [{"x": torch.randn(4, 4), "y": torch.randint(0, 3, (4,))} for _ in range(2)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    recipe = Recipe.capture(model, batch=batches, loss=loops.loss, optimizer=optimizer, scheduler=scheduler, step=step,
                            clip_grad_norm=1e3, **options)  # fmt: skip
    return model, recipe


@pytest.mark.parametrize(
    ("step", "precision"), [(loops.right, "native"), (loops.right_bf16, "bf16-autocast")], ids=["float32", "bf16"]
)
def test_a_right_loop_is_audited_wholly(client: MlflowClient, tmp_path: Path, step: Any, precision: str) -> None:
    mlflow.set_experiment("models")
    model, recipe = captured(step, precision=precision)
    log_model(model, "model", recipe=recipe, factory="tests.registry_models.integrations.loops:Net")
    report = audited(client, "models:/model/1", tmp_path / "audit")
    assert report.outcome in (Outcome.PASS, Outcome.WARN), [(r.check, r.message) for r in report.findings]
    assert report.coverage == 1.0
    judged = {row.check for row in report.rows if row.outcome is Outcome.PASS}
    assert {"step.clipping", "step.count", "step.learning-rate", "step.mode"} <= judged


@pytest.mark.parametrize(
    ("step", "check"),
    [
        (loops.sums, "step.gradient"),
        (loops.divides, "step.gradient"),
        (loops.forgets_zero_grad, "step.gradient"),
        (loops.clips_often, "step.clipping"),
        (loops.clips_by_value, "step.clipping"),
        (loops.clips_to_another_norm, "step.clipping"),
        (loops.steps_often, "step.count"),
        (loops.schedules_often, "step.learning-rate"),
        (loops.leaves_eval, "step.mode"),
        (loops.writes_weights, "update.outside-step"),
    ],
)
def test_a_fault_is_caught(step: Any, check: str) -> None:
    model, recipe = captured(step)
    report = audit(model, recipe, device="cpu")
    failed = {row.check for row in report.findings if row.outcome is Outcome.FAIL}
    assert check in failed, [(row.check, row.message) for row in report.findings]
