"""Averages that follow the weights from before the step: MoCo's key encoder, updated before the optimizer steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from audits import Outcome
from tests.audits.updates.subjects import audited, of

KEEP = 0.9


class Contrast(nn.Module):
    """A query encoder, the key encoder that follows it, and a queue of keys."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8))
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(16, 8), dim=1))


def contrast(model: Any, batch: Any) -> torch.Tensor:
    query = F.normalize(model.query(batch["a"]), dim=1)
    with torch.no_grad():
        key = F.normalize(model.key(batch["b"]), dim=1)
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ model.queue.mT], 1) / 0.2
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long))


def step_of(when: str) -> Any:
    def follow(model: Any) -> None:
        with torch.no_grad():
            for key, query in zip(model.key.parameters(), model.query.parameters(), strict=True):
                key.mul_(KEEP).add_(query, alpha=1 - KEEP)

    def step(model: Any, batch: Any, context: Any) -> None:
        if when == "before":
            follow(model)
        context.optimizer.zero_grad()
        contrast(model, batch).backward()
        context.optimizer.step()
        if when == "after":
            follow(model)

    return step


def outcomes(really: str, declared: str | None, dtype: torch.dtype = torch.float32) -> list[Any]:
    torch.manual_seed(0)
    model = Contrast()
    with torch.no_grad():  # a key encoder that has fallen behind
        for parameter in model.key.parameters():
            parameter.mul_(0.9)
    ema: dict[str, Any] = {"source": "query", "decay": KEEP} | ({} if declared is None else {"when": declared})
    return of(
        audited(
            model.to(dtype),
            batch={"a": torch.randn(8, 6, dtype=dtype), "b": torch.randn(8, 6, dtype=dtype)},
            loss=contrast,
            optimizer=torch.optim.SGD(model.query.parameters(), lr=0.1),
            step=step_of(really),
            expect={"ema": {"key": ema}},
        ),
        "buffers.ema",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("really", "declared"), [("after", None), ("after", "after"), ("before", "before")])
def test_a_shadow_that_follows_as_declared_passes(really: str, declared: str | None, dtype: torch.dtype) -> None:
    rows = outcomes(really, declared, dtype)
    assert len(rows) == 4
    assert {row.outcome for row in rows} == {Outcome.PASS}


def test_one_that_follows_the_weights_from_before_fails_with_the_declaration() -> None:
    rows = outcomes("before", None)
    assert {row.outcome for row in rows} == {Outcome.FAIL}
    text = "it averaged the weights from before the step; declare 'when': 'before' if that is meant"
    assert all(row.message.endswith(text) for row in rows)


def test_one_that_is_declared_to_lag_and_does_not_fails() -> None:
    rows = outcomes("after", "before")
    assert {row.outcome for row in rows} == {Outcome.FAIL}
    assert "of query.0.weight before step 1" in rows[0].message
