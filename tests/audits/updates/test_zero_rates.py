"""A rate of 0 at the captured step: the rule is judged at another one, and a group that never moves is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from audits.live.subject import open_subject
from audits.outcomes import Outcome, ResultRow
from audits.recipe.recipe import Recipe
from audits.updates import check_registration, check_updates
from tests.wrong_on_purpose.updates import models

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def judged(
    groups: tuple[float, float], scheduler: Any = None, dtype: torch.dtype = torch.float32, cls: Any = None,
    started: float | None = None, **options: Any,
) -> list[ResultRow]:  # fmt: skip
    model, batch = models.mlp()
    model = model.to(dtype)
    first, others = list(model.first.parameters()), [*model.second.parameters(), *model.head.parameters()]
    optimizer = (cls or torch.optim.AdamW)(
        [{"params": first, "lr": groups[0]}, {"params": others, "lr": groups[1]}], lr=1e-2
    )
    if started is not None:
        for group in optimizer.param_groups:
            group["initial_lr"] = started
    schedule = None if scheduler is None else torch.optim.lr_scheduler.LambdaLR(optimizer, scheduler)
    recipe = Recipe.capture(model, batch={"x": batch["x"].to(dtype), "y": batch["y"]}, loss=models.classify,
                            optimizer=optimizer, scheduler=schedule, **options)  # fmt: skip
    with open_subject(model, recipe, device="cpu") as subject:
        return check_registration(subject) + check_updates(subject)


def rules(rows: list[ResultRow], name: str) -> list[ResultRow]:
    return [row for row in rows if row.check == "update.rule" and row.parameter == name]


def warned(rows: list[ResultRow]) -> list[str]:
    return [row.message for row in rows if row.check == "step.learning-rate" and row.outcome is Outcome.WARN]


class Coupled(torch.optim.AdamW):
    """Decays into the gradient, with what calls itself AdamW."""

    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.detach(), alpha=10.0)
        return super().step(closure)


@DTYPES
def test_a_rate_of_zero_is_assumed_and_the_group_is_named(dtype: torch.dtype) -> None:
    rows = judged((0.0, 1e-3), dtype=dtype)
    assert all(row.outcome is Outcome.PASS and row.cause == "assumed" for row in rules(rows, "first.weight"))
    assert all("0.01 was assumed, the optimizer's default" in row.message for row in rules(rows, "first.weight"))
    assert all(row.outcome is Outcome.PASS and row.cause is None for row in rules(rows, "head.weight"))
    (text,) = warned(rows)
    assert "group 0" in text
    assert "first.weight" in text


def test_without_any_rate_a_usual_one_is_assumed() -> None:
    model, batch = models.mlp()
    recipe = Recipe.capture(
        model, batch=batch, loss=models.classify, optimizer=torch.optim.SGD(model.parameters(), lr=0.0)
    )
    with open_subject(model, recipe, device="cpu") as subject:
        rows = check_updates(subject)
    assert all(row.outcome is Outcome.PASS and "0.001 was assumed" in row.message for row in rules(rows, "head.bias"))
    assert len(warned(rows)) == 1


def test_a_captured_initial_rate_is_taken_and_no_warning_given() -> None:
    rows = judged((0.0, 0.0), started=5e-3)
    assert all("0.005 was assumed, its group's initial_lr" in row.message for row in rules(rows, "head.weight"))
    assert warned(rows) == []


@DTYPES
def test_a_warm_up_is_entered_at_its_first_rate(dtype: torch.dtype) -> None:
    rows = judged((1e-3, 1e-3), lambda k: k / 10, dtype)
    assert all(row.outcome is Outcome.PASS and row.cause is None for row in rules(rows, "first.weight"))
    assert warned(rows) == []


def test_a_schedule_that_has_ended_is_judged_at_the_initial_rate() -> None:
    rows = judged((1e-3, 1e-3), lambda k: 0.0)
    assert all(row.outcome is Outcome.PASS and row.cause == "assumed" for row in rules(rows, "first.weight"))
    assert warned(rows) == []


def test_one_group_that_begins_later_is_judged_at_its_own_first_rate() -> None:
    rows = judged((1e-3, 1e-3), [lambda k: float(k >= 4), lambda k: 1.0])
    assert all("the schedule's first above 0" in row.message for row in rules(rows, "first.weight"))
    assert all(row.outcome is Outcome.PASS for row in rules(rows, "first.weight"))
    assert warned(rows) == []


def test_one_group_at_zero_in_every_step_of_the_schedule_is_named() -> None:
    rows = judged((1e-3, 1e-3), [lambda k: 0.0, lambda k: 1.0])
    (text,) = warned(rows)
    assert "group 0" in text
    assert "at every step of the schedule" in text
    assert all(row.outcome is Outcome.PASS for row in rules(rows, "first.weight"))


def test_a_wrong_rule_fails_at_the_assumed_rate() -> None:
    rows = judged((0.0, 0.0), cls=Coupled)
    assert any(row.outcome is Outcome.FAIL and row.parameter == "first.weight" for row in rows)
    right = judged((0.0, 0.0))
    assert not [row.message for row in right if row.outcome is Outcome.FAIL]


def test_a_step_that_sets_the_rate_itself_is_believed() -> None:
    def step(model: Any, batch: Any, context: Any) -> None:
        for group in context.optimizer.param_groups:
            group["lr"] = 2e-3
        context.optimizer.zero_grad()
        models.classify(model, batch).backward()
        context.optimizer.step()

    rows = judged((0.0, 0.0), step=step)
    assert all(row.outcome is Outcome.PASS and row.cause is None for row in rules(rows, "first.weight"))
    assert warned(rows) == []
    assert not [row.message for row in rows if row.outcome is Outcome.FAIL]


def test_a_declared_rate_of_zero_is_what_was_captured() -> None:
    rows = judged((0.0, 1e-3), expect={"lr": {"first.*": 0.0, "*": 1e-3}})
    assert not [row.message for row in rows if row.outcome is Outcome.FAIL]
