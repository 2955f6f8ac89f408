"""A step that changes its batch in place gives the next step other data: a warning, a failure where that matters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from audits.live.subject import open_subject
from audits.outcomes import Outcome, ResultRow
from audits.recipe.recipe import Recipe
from audits.updates import check_updates
from tests.wrong_on_purpose.updates import models

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)

Batch = dict[str, torch.Tensor]


def halving(model: nn.Module, batch: Batch) -> torch.Tensor:
    batch["x"].mul_(0.5)
    return models.classify(model, batch)


def halving_a_copy(model: nn.Module, batch: Batch) -> torch.Tensor:
    return models.classify(model, {**batch, "x": batch["x"] * 0.5})


def clamping(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Changes its batch so that doing it again changes nothing."""
    batch["x"].clamp_(-1.0, 1.0)
    return models.classify(model, batch)


def ignoring(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Writes -100 into the labels, as collators do."""
    batch["y"][batch["y"] == 0] = -100
    return F.cross_entropy(model(batch["x"]), batch["y"], ignore_index=-100)


def stepping(loss: Any, before: Any = None, after: Any = None) -> Any:
    def step(model: nn.Module, batch: Batch, context: Any) -> None:
        if before is not None:
            before(batch)
        context.optimizer.zero_grad()
        loss(model, batch).backward()
        context.optimizer.step()
        if after is not None:
            after(batch)

    return step


def judged(loss: Any, step: Any = None, dtype: torch.dtype = torch.float32, **options: Any) -> list[ResultRow]:
    model, batch = models.mlp()
    model = model.to(dtype)
    given = {"x": (3 * batch["x"]).to(dtype), "y": batch["y"]}
    recipe = Recipe.capture(model, batch=given, loss=loss, step=step,
                            optimizer=torch.optim.SGD(model.parameters(), lr=0.1), **options)  # fmt: skip
    kept = {key: value.clone() for key, value in recipe.batch.items()}
    with open_subject(model, recipe, device="cpu") as subject:
        rows = check_updates(subject)
    assert all(torch.equal(recipe.batch[key], kept[key]) for key in kept)
    return rows


def of(rows: list[ResultRow]) -> tuple[Outcome, str]:
    (found,) = [row for row in rows if row.check == "step.batch-unchanged"]
    return found.outcome, found.message


def others_that_fail(rows: list[ResultRow]) -> list[str]:
    return [row.message for row in rows if row.outcome is Outcome.FAIL and row.check != "step.batch-unchanged"]


@DTYPES
@pytest.mark.parametrize("own", [False, True], ids=["canonical", "own step"])
def test_a_loss_that_halves_its_inputs_fails_and_its_twin_passes(own: bool, dtype: torch.dtype) -> None:
    rows = judged(halving, stepping(halving) if own else None, dtype)
    outcome, message = of(rows)
    assert outcome is Outcome.FAIL
    assert "'x'" in message
    assert others_that_fail(rows) == []
    rows = judged(halving_a_copy, stepping(halving_a_copy) if own else None, dtype)
    assert of(rows)[0] is Outcome.PASS
    assert others_that_fail(rows) == []


@pytest.mark.parametrize("own", [False, True], ids=["canonical", "own step"])
@pytest.mark.parametrize(("loss", "path"), [(clamping, "'x'"), (ignoring, "'y'")])
def test_a_change_that_repeats_without_effect_only_warns(loss: Any, path: str, own: bool) -> None:
    rows = judged(loss, stepping(loss) if own else None)
    outcome, message = of(rows)
    assert outcome is Outcome.WARN
    assert path in message
    assert others_that_fail(rows) == []


def test_a_step_that_normalises_in_place_fails_and_one_with_a_copy_passes() -> None:
    def normalise(batch: Batch) -> None:
        batch["x"].sub_(1.0).div_(2.0)

    rows = judged(models.classify, stepping(models.classify, before=normalise))
    assert of(rows)[0] is Outcome.FAIL
    assert others_that_fail(rows) == []

    def copied(batch: Batch) -> None:
        batch["x"] = batch["x"] + 0.0

    rows = judged(models.classify, stepping(models.classify, before=copied))
    assert of(rows)[0] is Outcome.PASS
    assert others_that_fail(rows) == []


def test_a_step_that_spoils_the_batch_behind_torch_s_back_is_seen() -> None:
    def spoil(batch: Batch) -> None:
        batch["x"].data.mul_(0.1)

    rows = judged(models.classify, stepping(models.classify, after=spoil))
    assert of(rows)[0] is Outcome.FAIL


def test_micro_batches_are_looked_at_too() -> None:
    def step(model: nn.Module, batch: Batch, context: Any) -> None:
        context.optimizer.zero_grad()
        for x, y in zip(batch["x"].chunk(3), batch["y"].chunk(3), strict=True):
            (halving(model, {"x": x, "y": y}) / 3).backward()
        context.optimizer.step()

    rows = judged(halving, step, accumulate=3)
    assert of(rows)[0] is Outcome.FAIL
    assert others_that_fail(rows) == []
