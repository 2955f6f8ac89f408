"""An optimizer that went through a version: its attributes and hooks come back, what cannot is no pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from mlflow.tracking import MlflowClient
from torch.optim import SGD, AdamW

from audits import AuditReport, Outcome, Recipe
from audits.recipe.digests import recipe_digest
from registry_models import log_model
from registry_models.recipes.recipe_files import STATE_FILE, read_recipe, write_recipe
from tests.audits.updates import live_optimizers as live
from tests.registry_models.auditing import audited, in_a_child


def _recipe(make: Any, steps: int = 3, **fields: Any) -> tuple[live.Net, Recipe]:
    model, batch = live.subject()
    optimizer = make(model)
    live.trained(model, batch, optimizer, steps)
    return model, Recipe.capture(model, batch=batch, loss=live.classify, optimizer=optimizer, **fields)


def _judged(client: MlflowClient, folder: Path, make: Any, steps: int = 3, **fields: Any) -> AuditReport:
    mlflow.set_experiment("models")
    model, recipe = _recipe(make, steps, **fields)
    log_model(model, "net", recipe=recipe, factory=live.Net)
    return audited(client, "models:/net/1", folder / "audited")


def _hooked(cls: Any, *, pre: Any = None, post: Any = None, **options: Any) -> Any:
    def make(model: torch.nn.Module) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = cls(model.parameters(), **options)
        if pre is not None:
            optimizer.register_step_pre_hook(pre)
        if post is not None:
            optimizer.register_step_post_hook(post)
        return optimizer

    return make


def _flagged(coupled: bool, later: bool) -> Any:
    def make(model: torch.nn.Module) -> torch.optim.Optimizer:
        optimizer = live.Flagged(model.parameters(), coupled=coupled is not later)
        optimizer.coupled = coupled
        return optimizer

    return make


def _failing(report: AuditReport) -> dict[str, str]:
    return {r.check: r.message for r in report.rows if r.outcome is Outcome.FAIL}


@pytest.mark.sampled(cases=3)
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (_hooked(AdamW, post=live.looks_on, lr=0.01), {}),
        (
            _hooked(AdamW, pre=live.takes_signs, lr=0.01),
            {"step": live.own_step, "expect": {"step_hooks": "takes_signs"}},
        ),
        (_flagged(False, True), {}),
        (lambda m: live.Slotted(m.parameters(), 1.0, lr=0.1), {"expect": {"optimizer": "SGD"}}),
        (lambda m: live.Private(m.parameters()), {"expect": {"optimizer": "SGD"}}),
        (lambda m: live.Plain(m.parameters()), {}),
        (lambda m: live.Made(m.parameters()), {"expect": {"optimizer": "SGD"}}),
    ],
    ids=["hook", "declared hook", "set later", "slot", "private state", "subclass", "made by its constructor"],
)
def test_a_right_one_passes_as_a_version(client: MlflowClient, tmp_path: Path, make: Any, fields: Any) -> None:
    report = _judged(client, tmp_path, make, **fields)
    assert (report.outcome, report.coverage) == (Outcome.PASS, 1.0), report.headline


@pytest.mark.slow
@pytest.mark.sampled(cases=3)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "check", "text", "fields"),
    [
        (_hooked(SGD, post=live.clamps_weights, lr=0.1), "update.outside-step", "live_optimizers.clamps_weights", {}),
        (_hooked(AdamW, pre=live.takes_signs, lr=0.01), "step.gradient", "live_optimizers.takes_signs", {}),
        (_flagged(True, False), "update.rule", "AdamW", {}),
        (_flagged(True, True), "update.rule", "AdamW", {}),
        (lambda m: live.Slotted(m.parameters(), 0.5, lr=0.1), "update.rule", "0.5", {"expect": {"optimizer": "SGD"}}),
        (lambda m: live.Lost(m.parameters()), "registration.state-round-trip", "state_dict",
         {"expect": {"optimizer": "SGD"}}),
    ],
    ids=["clamp", "sign", "argument", "set later", "slot", "private state"],
)  # fmt: skip
def test_a_wrong_one_fails_as_a_version(
    client: MlflowClient, tmp_path: Path, make: Any, check: str, text: str, fields: Any
) -> None:
    report = _judged(client, tmp_path, make, steps=0, **fields)
    assert text in _failing(report)[check]


def _remade(model: torch.nn.Module) -> torch.optim.Optimizer:
    optimizer = live.Made(model.parameters())
    optimizer.schedule = live.Schedule(0.5)
    return optimizer


class _Note:
    """No plain value."""


def _wrapped(model: torch.nn.Module) -> torch.optim.Optimizer:
    optimizer = AdamW(model.parameters(), lr=0.01)
    original = optimizer.step
    optimizer.step = lambda closure=None: original(closure)  # type: ignore[method-assign]
    return optimizer


def _noted(model: torch.nn.Module) -> torch.optim.Optimizer:
    optimizer = live.Plain(model.parameters(), lr=0.01)
    optimizer.note = _Note()  # type: ignore[attr-defined]
    return optimizer


@pytest.mark.sampled(cases=2)
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "text"),
    [
        (_hooked(AdamW, post=lambda *_: None, lr=0.01), "the step post-hook"),
        (_wrapped, "the step set on the instance"),
        (_noted, "its attribute 'note' (_Note)"),
        (_remade, "its attribute 'schedule' (Schedule)"),
    ],
    ids=["lambda", "wrapped step", "object", "another than the constructor's"],
)
def test_what_cannot_be_stored_is_named_and_is_no_pass(
    client: MlflowClient, tmp_path: Path, make: Any, text: str
) -> None:
    report = _judged(client, tmp_path, make)
    assert (report.outcome, report.coverage) == (Outcome.INCONCLUSIVE, 0.0)
    (whole,) = [r for r in report.rows if r.check == "registration.optimizer-whole"]
    assert whole.outcome is Outcome.INCONCLUSIVE
    assert text in whole.message
    assert {r.outcome for r in report.rows if r.check == "update.rule"} == {Outcome.INCONCLUSIVE}


@pytest.mark.end_to_end
@pytest.mark.filterwarnings("ignore")
def test_a_process_of_its_own_imports_the_hooks(client: MlflowClient, tmp_path: Path) -> None:
    mlflow.set_experiment("models")
    model, recipe = _recipe(_hooked(SGD, post=live.clamps_weights, lr=0.1))
    log_model(model, "net", recipe=recipe, factory=live.Net)
    assert "live_optimizers.clamps_weights" in _failing(in_a_child(client, "models:/net/1", tmp_path / "c"))[
        "update.outside-step"
    ]  # fmt: skip


def test_attributes_and_hooks_survive_the_files(tmp_path: Path) -> None:
    for number, make in enumerate((_hooked(SGD, pre=live.clips, lr=0.1), lambda m: live.Private(m.parameters()),
                                   lambda m: live.Slotted(m.parameters(), 1.0, lr=0.1))):  # fmt: skip
        _, recipe = _recipe(make)
        again = read_recipe(write_recipe(recipe, tmp_path / str(number)))
        assert again == recipe
        assert recipe_digest(again) == recipe_digest(recipe)
        left, right = again.phases[0].optimizer.kept, recipe.phases[0].optimizer.kept
        assert left is not None
        assert right is not None
        assert left.missing == right.missing == ()


def test_a_recipe_of_torchs_own_optimizer_has_no_new_key(tmp_path: Path) -> None:
    _, recipe = _recipe(lambda m: AdamW(m.parameters()))
    folder = write_recipe(recipe, tmp_path)
    text = (folder / "recipe.yaml").read_text()
    assert "attributes" not in text
    assert "missing" not in text
    assert (folder / STATE_FILE).exists()


def test_an_old_recipe_of_another_class_is_read_and_says_what_it_does_not_know(tmp_path: Path) -> None:
    import audits

    model, recipe = _recipe(lambda m: live.Plain(m.parameters()))
    folder = write_recipe(recipe, tmp_path)
    path = folder / "recipe.yaml"
    lines = path.read_text().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if line.strip().startswith("attributes:"))
    deeper = len(lines[at]) - len(lines[at].lstrip())
    end = next((i for i in range(at + 1, len(lines)) if len(lines[i]) - len(lines[i].lstrip()) <= deeper), len(lines))
    path.write_text("".join(lines[:at] + lines[end:]))
    report = audits.audit(model, read_recipe(folder), device="cpu")
    assert report.outcome is Outcome.INCONCLUSIVE
    assert "records no attributes" in next(r.message for r in report.rows if r.check == "registration.optimizer-whole")
