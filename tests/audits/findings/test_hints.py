"""What is said to a wrong guess: the name that was begun, what a module defines itself, what a step's context has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from audits import AuditSettings, Outcome, Phase, Recipe, audit
from audits.checks import CHECKS
from audits.errors import RecipeError, SettingsError, suggest
from audits.recipe.callables import CallableReference


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("gradient.finit", "gradient.finite-difference"),
        ("gradient.finte-difference", "gradient.finite-difference"),
        ("registration.cov", "registration.coverage"),
        ("update.isolatoin", "update.isolation"),
    ],
)
def test_what_was_begun_is_what_was_meant(written: str, meant: str) -> None:
    assert suggest(written, CHECKS) == f"; did you mean {meant!r}?"


def test_nothing_near_is_no_suggestion() -> None:
    assert suggest("zzz", CHECKS) == ""
    assert suggest("", CHECKS) == ""


def test_a_check_that_is_none_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"did you mean 'gradient\.finite-difference'"):
        AuditSettings(checks=("gradient.finte-difference",))
    assert AuditSettings(checks=("gradient.*",)).narrowed


def test_a_function_is_looked_for_among_a_modules_own() -> None:
    with pytest.raises(RecipeError) as refused:
        CallableReference.of("tests.registry_models.stepping:nosuch", role="step").resolve(role="step")
    assert "'torch'" not in str(refused.value)
    assert "it has Twice, batch, loss" in str(refused.value)
    with pytest.raises(RecipeError, match="did you mean 'rolled_step'"):
        CallableReference.of("tests.registry_models.stepping:roled_step", role="step").resolve(role="step")


def on_the_context(model: nn.Module, batch: Any, context: Any) -> None:
    context.zero_grad()


def of_another_phase(model: nn.Module, batch: Any, context: Any) -> None:
    context.optimizers["secnd"].zero_grad()


def by_another_name(model: nn.Module, batch: Any, context: Any) -> None:
    context.optimisers["first"].step()


@pytest.mark.parametrize(
    ("step", "phases", "hint"),
    [
        (on_the_context, ["step"], "has no 'zero_grad'; did you mean context.optimizer.zero_grad?"),
        (on_the_context, ["first", "second"], "did you mean context.optimizers['first'].zero_grad?"),
        (of_another_phase, ["first", "second"], "there is no phase 'secnd' here; did you mean 'second'?"),
        (by_another_name, ["first", "second"], "has no 'optimisers'; did you mean 'optimizers'?"),
    ],
)
def test_a_wrong_guess_in_a_step_gets_a_hint_about_the_step(
    step: Callable[..., None], phases: list[str], hint: str
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    batch = {"inputs": torch.randn(4, 3), "targets": torch.randn(4, 2)}
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.01) for part in model]
    if len(phases) == 1:
        options: dict[str, Any] = {"loss": "mse_loss", "optimizer": torch.optim.SGD(model.parameters(), lr=0.01)}
    else:
        found = [Phase(n, loss="mse_loss", optimizer=o) for n, o in zip(phases, optimizers, strict=True)]
        options = {"phases": found}
    report = audit(model, Recipe.capture(model, batch=batch, step=step, **options))
    assert report.outcome is Outcome.INCONCLUSIVE
    assert hint in report.headline


def test_findings_are_those_of_the_json() -> None:
    model = nn.Linear(3, 2)
    batch = {"inputs": torch.randn(4, 3), "targets": torch.randn(4, 2)}
    optimizer = torch.optim.SGD([model.weight], lr=0.01)
    report = audit(model, Recipe.capture(model, batch=batch, loss="mse_loss", optimizer=optimizer))
    told = report.to_dict()
    assert [(r.check, r.parameter) for r in report.findings] == [(f["check"], f["parameter"]) for f in told["findings"]]
    assert report.findings
    assert Outcome.SKIPPED not in {row.outcome for row in report.findings}
    assert report.not_checked == told["not_checked"] != []


def test_a_narrowed_report_is_judged_by_its_own_rows() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    batch = {"inputs": torch.randn(4, 3), "targets": torch.randn(4, 2)}
    recipe = Recipe.capture(
        model, batch=batch, loss="mse_loss", optimizer=torch.optim.SGD([model.weight], lr=0.01)
    )  # fmt: skip
    right = audit(model, recipe, settings=AuditSettings(checks=("gradient.finite-difference",)))
    assert right.outcome is Outcome.PASS, str(right)
    assert right.headline.endswith("only what was asked for was looked at.")
    assert audit(model, recipe, settings=AuditSettings(checks=("registration.*",))).outcome is Outcome.FAIL
    with pytest.raises(SettingsError, match=r"--parameter 'wieght' matches no parameter .*; did you mean 'weight'"):
        audit(model, recipe, settings=AuditSettings(parameters=("wieght",)))
