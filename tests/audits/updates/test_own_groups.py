"""Steps that take the batch's rows in groups or in an order of their own: right ones pass, wrong ones fail by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from audits import Outcome
from tests.audits.updates.subjects import audited, failed, of

ROWS = 8


def dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.2), nn.GELU(), nn.Linear(16, 3))


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Linear(16, 3))


def both() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 3))


def strided() -> Iterator[list[int]]:
    yield from (list(range(ROWS))[i::2] for i in range(2))


def uneven() -> Iterator[list[int]]:
    yield from (list(range(5)), list(range(5, ROWS)))


def shuffled() -> Iterator[list[int]]:
    yield torch.randperm(ROWS).tolist()


def shuffled_in_two() -> Iterator[list[int]]:
    order = torch.randperm(ROWS).tolist()
    yield from (order[:4], order[4:])


def classify(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def inline(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def mean(rows: list[int]) -> float:
    return len(rows) / ROWS


def step_of(
    groups: Callable[[], Iterator[list[int]]],
    loss: Any = inline,
    weight: Callable[[list[int]], float] = mean,
    labels: int = 0,
) -> Any:
    def step(model: nn.Module, batch: Any, context: Any) -> None:
        context.optimizer.zero_grad()
        for rows in groups():
            part = {"x": batch["x"][rows], "y": batch["y"].roll(labels)[rows]}
            (loss(model, part) * weight(rows)).backward()
        context.optimizer.step()

    return step


def rows_of(make: Callable[[], nn.Module], step: Any, dtype: torch.dtype = torch.float32, loss: Any = classify) -> Any:
    torch.manual_seed(0)
    model, batch = make().to(dtype), {"x": torch.randn(ROWS, 6, dtype=dtype), "y": torch.arange(ROWS) % 3}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return audited(model, batch=batch, loss=loss, optimizer=optimizer, step=step)


def wrong(rows: Any) -> list[str]:
    """The messages of `step.gradient` rows that fail; no other check does."""
    assert {check for check, _ in failed(rows)} == {"step.gradient"}
    return [row.message for row in of(rows, "step.gradient") if row.outcome is Outcome.FAIL]


@pytest.mark.sampled(cases=10)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", [inline, classify])
@pytest.mark.parametrize("groups", [strided, uneven, shuffled, shuffled_in_two])
@pytest.mark.parametrize("make", [dropout, batch_norm, both])
def test_every_row_once_is_the_same_step(make: Any, groups: Any, loss: Any, dtype: torch.dtype) -> None:
    rows = rows_of(make, step_of(groups, loss), dtype)
    assert failed(rows) == []
    judged = of(rows, "step.gradient")
    assert {row.outcome for row in judged} == {Outcome.PASS}
    assert len(judged) >= 4


def test_groups_are_said_with_their_weights() -> None:
    messages = {row.message for row in of(rows_of(both, step_of(uneven)), "step.gradient")}
    text = "the step takes the batch's rows in 2 groups of its own, weighed by its rows"
    assert all(message.endswith(text) for message in messages), messages


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [dropout, batch_norm, both])
def test_a_sum_over_groups_is_named(make: Any, dtype: torch.dtype) -> None:
    rows = rows_of(make, step_of(strided, weight=lambda _: 1.0), dtype)
    for message in wrong(rows):
        assert "the scale is off by a factor 2: the sum over 2 micro-batches instead of their mean" in message
        assert "takes the batch's rows in 2 groups of its own, and so was the reference evaluated" in message


@pytest.mark.parametrize("clipped_to", [0.01, 100.0])
def test_a_sum_over_groups_is_named_behind_the_clipping(clipped_to: float) -> None:
    def step(model: nn.Module, batch: Any, context: Any) -> None:
        context.optimizer.zero_grad()
        for rows in strided():
            inline(model, {"x": batch["x"][rows], "y": batch["y"][rows]}).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clipped_to)
        context.optimizer.step()

    torch.manual_seed(0)
    model = both()
    rows = audited(
        model,
        batch={"x": torch.randn(ROWS, 6), "y": torch.arange(ROWS) % 3},
        loss=classify,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        step=step,
        clip_grad_norm=clipped_to,
    )
    assert of(rows, "step.clipping")[0].outcome is Outcome.FAIL
    wrong = [row.message for row in of(rows, "step.gradient") if row.outcome is Outcome.FAIL]
    text = "the scale is off by a factor 2 before the clipping: the sum over 2 micro-batches instead of their mean"
    assert bool(wrong) is (clipped_to > 1), "clipped to the same norm, both are the same gradient"
    assert all(text in message for message in wrong)


@pytest.mark.parametrize("make", [dropout, both])
def test_a_mean_of_means_is_named(make: Any) -> None:
    rows = rows_of(make, step_of(uneven, weight=lambda _: 0.5))
    assert any("the micro-batches count alike (a mean of means) instead of by its rows" in m for m in wrong(rows))


@pytest.mark.parametrize("groups", [strided, shuffled, shuffled_in_two])
@pytest.mark.parametrize("make", [dropout, batch_norm, both])
def test_labels_of_other_rows_are_found(make: Any, groups: Any) -> None:
    rows = rows_of(make, step_of(groups, labels=1))
    assert wrong(rows)


def left_out() -> Iterator[list[int]]:
    yield from ([0, 1, 2], [4, 5, 6])


def twice() -> Iterator[list[int]]:
    yield from ([0, 1, 2, 3, 4], [4, 5, 6, 7])


@pytest.mark.parametrize("groups", [left_out, twice])
@pytest.mark.parametrize("make", [dropout, batch_norm])
def test_rows_left_out_or_taken_twice_do_not_pass(make: Any, groups: Any) -> None:
    judged = of(rows_of(make, step_of(groups)), "step.gradient", "3.weight")
    assert [row.outcome for row in judged if row.outcome is Outcome.PASS] == []
    assert judged


class TwoTowers(nn.Module):
    """Called by its parts: two forwards an evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2))
        self.right = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2))


def towers(model: Any, batch: Any) -> torch.Tensor:
    score = (model.left(batch["x"]) * model.right(batch["x"].flip(1))).sum(1)
    return F.mse_loss(score, batch["y"].to(score.dtype))


def test_parts_that_are_called_from_the_loss_are_seen() -> None:
    rows = rows_of(TwoTowers, step_of(shuffled_in_two, lambda m, b: towers(m, b)), loss=towers)
    assert failed(rows) == []
    assert {row.outcome for row in of(rows, "step.gradient")} == {Outcome.PASS}
