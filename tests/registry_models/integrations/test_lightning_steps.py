"""Lightning's own training step, from the callback through the registry: faults that people make, and right twins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from mlflow.tracking import MlflowClient

from audits.outcomes import Outcome
from audits.report import AuditReport
from tests.registry_models.auditing import audited

lightning = pytest.importorskip("lightning", reason="the extra 'lightning' is not installed")

from registry_models.integrations.lightning import GradauditCallback  # noqa: E402
from tests.registry_models.integrations import fitted  # noqa: E402
from tests.registry_models.lightning_modules import Classifier  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]  # of the framework about itself

#: What a canonical step cannot get wrong, and Lightning's can.
HANDLING = ("step.count", "step.learning-rate", "step.mode")


def trained(client: MlflowClient, folder: Path, cls: Any, callbacks: Any = (), **flags: Any) -> AuditReport:
    """Fit with nothing of gradaudit's but the callback, and audit what it registered."""
    mlflow.set_experiment("models")
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(24, 4), torch.randint(0, 3, (24,)))
    callback = GradauditCallback("model", factory=cls)
    lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback, *callbacks], **flags,
    ).fit(cls(), torch.utils.data.DataLoader(data, batch_size=4))  # fmt: skip
    assert callback.version is not None
    return audited(client, "models:/model/1", folder / "audit")


@pytest.mark.parametrize(
    ("cls", "options", "clipped"),
    [
        pytest.param(Classifier, {}, False, id="plain"),
        pytest.param(fitted.Plain, {"gradient_clip_val": 0.5, "accumulate_grad_batches": 3}, True, id="accumulated"),
        pytest.param(fitted.Plain, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, True, id="value"),
        pytest.param(fitted.Plain, {"precision": "bf16-mixed", "gradient_clip_val": 0.5}, True, id="bf16"),
        pytest.param(fitted.Plain, {"callbacks": [fitted.Counts()]}, False, id="callback that looks"),
        pytest.param(fitted.ByHand, {}, True, id="by hand"),
        pytest.param(fitted.Adversaries, {}, False, id="toggled"),
    ],
)
def test_a_right_fit_is_audited_wholly(
    client: MlflowClient, tmp_path: Path, cls: Any, options: dict[str, Any], clipped: bool
) -> None:
    report = trained(client, tmp_path, cls, **options)
    assert report.outcome in (Outcome.PASS, Outcome.WARN), [(r.check, r.message) for r in report.findings]
    assert report.coverage == 1.0
    judged = {row.check for row in report.rows if row.outcome is Outcome.PASS}
    assert {*HANDLING, *(["step.clipping"] if clipped else [])} <= judged


@pytest.mark.parametrize(
    ("cls", "options", "check", "named"),
    [
        pytest.param(fitted.StepsTwice, {}, "step.count", "StepsTwice.optimizer_step", id="twice"),
        pytest.param(fitted.NeverClips, {"gradient_clip_val": 0.01}, "step.clipping",
                     "NeverClips.configure_gradient_clipping", id="never clips"),
        pytest.param(fitted.ClipsByValue, {"gradient_clip_val": 0.01}, "step.clipping",
                     "ClipsByValue.configure_gradient_clipping", id="by value"),
        pytest.param(fitted.SchedulesTwice, {}, "step.learning-rate", "SchedulesTwice.lr_scheduler_step",
                     id="schedule"),
        pytest.param(fitted.LeavesEval, {}, "step.mode", "module.train() before Trainer.fit", id="eval"),
        pytest.param(fitted.ZeroesGradients, {}, "step.gradient-present", "ZeroesGradients.on_before_optimizer_step",
                     id="zeroes"),
        pytest.param(fitted.AddsUp, {"accumulate_grad_batches": 3}, "step.gradient", "AddsUp.backward", id="adds up"),
        pytest.param(fitted.ShrinksWeights, {}, "update.outside-step", "ShrinksWeights.on_train_batch_end",
                     id="weights"),
        pytest.param(fitted.NeverClears, {}, "step.gradient", "NeverClears.training_step", id="zero_grad"),
        pytest.param(fitted.NeverToggles, {}, "step.gradient", "NeverToggles.training_step", id="toggle"),
        pytest.param(fitted.Plain, {"callbacks": [fitted.Doubles()]}, "step.gradient", "Doubles.on_after_backward",
                     id="callback"),
        pytest.param(fitted.Detaches, {}, "gradient.finite-difference", "detach", id="detached"),
    ],
)  # fmt: skip
def test_a_fault_is_caught_and_its_method_named(
    client: MlflowClient, tmp_path: Path, cls: Any, options: dict[str, Any], check: str, named: str
) -> None:
    report = trained(client, tmp_path, cls, **options)
    assert report.outcome is Outcome.FAIL, report.headline
    failed = [row for row in report.findings if row.check == check and row.outcome is Outcome.FAIL]
    assert failed, [(row.check, row.message) for row in report.findings]
    assert all(named in f"{row.message} {row.where_to_look}" for row in failed), [r.where_to_look for r in failed]


@pytest.mark.parametrize(("cls", "text"), [(fitted.NeverClears, "zero_grad is missing"),
                                           (fitted.NeverToggles, "optimizer-0")])  # fmt: skip
def test_what_was_left_over_is_called_by_its_name(client: MlflowClient, tmp_path: Path, cls: Any, text: str) -> None:
    report = trained(client, tmp_path, cls)
    assert any(text in row.message for row in report.findings if row.check == "step.gradient"), report.headline
