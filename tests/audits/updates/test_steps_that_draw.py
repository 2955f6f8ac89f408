"""Steps that draw random numbers or make a batch of their own: right ones pass, wrong ones fail by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from audits import Outcome, Recipe, audit
from audits.outcomes import ResultRow
from tests.audits.updates.subjects import audited, failed, of

DTYPES = (torch.float32, torch.float64)


class Net(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.first, self.dropout, self.head = nn.Linear(6, 16), nn.Dropout(dropout), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.dropout(torch.tanh(self.first(x))))


def make(dropout: float, dtype: torch.dtype, rows: int = 8) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return Net(dropout).to(dtype), {"x": torch.randn(rows, 6, dtype=dtype), "y": torch.arange(rows) % 3}


def classify(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def diffuse(model: nn.Module, batch: Any) -> torch.Tensor:
    """A loss that draws before its forward, as a diffusion model's does."""
    x = batch["x"]
    time, noise = torch.rand(len(x), 1, dtype=x.dtype), torch.randn_like(x)
    return F.mse_loss(model(x * (1 - time) + noise * time), F.one_hot(batch["y"], 3).to(x.dtype))


def mix(model: nn.Module, batch: Any) -> torch.Tensor:
    """A loss that draws from NumPy alone: mixup."""
    share = float(np.random.beta(0.5, 0.5))
    flipped = {"x": batch["x"], "y": batch["y"].flip(0)}
    return share * classify(model, batch) + (1 - share) * classify(model, flipped)


def step_with(body: Callable[[nn.Module, Any], torch.Tensor]) -> Callable[[nn.Module, Any, Any], None]:
    def step(model: nn.Module, batch: Any, context: Any) -> None:
        context.optimizer.zero_grad()
        body(model, batch).backward()
        context.optimizer.step()

    return step


def judged(body: Any, *, loss: Any = classify, dropout: float = 0.3, dtype: torch.dtype = torch.float32,
           rows: int = 8) -> list[ResultRow]:  # fmt: skip
    model, batch = make(dropout, dtype, rows)
    return audited(model, batch=batch, loss=loss, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
                   step=step_with(body))  # fmt: skip


def outcomes(rows: list[ResultRow]) -> set[Outcome]:
    return {r.outcome for r in of(rows, "step.gradient")}


def draw(body: Callable[[nn.Module, Any], torch.Tensor]) -> Callable[[nn.Module, Any], torch.Tensor]:
    """The same, after the step has drawn from all three generators."""

    def drawing(model: nn.Module, batch: Any) -> torch.Tensor:
        torch.rand(3), np.random.rand(2)
        return body(model, batch)

    return drawing


def inlined(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("loss", "body"), [
    (classify, classify), (classify, inlined), ("cross_entropy", inlined), (diffuse, diffuse), (mix, mix),
], ids=["dropout", "inlined", "named", "diffusion", "numpy"])  # fmt: skip
def test_draws_before_the_loss_are_replayed(loss: Any, body: Any, dtype: torch.dtype) -> None:
    rows = judged(draw(body), loss=loss, dtype=dtype, rows=64 if loss is diffuse else 8)
    assert failed(rows) == []
    assert outcomes(rows) == {Outcome.PASS}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", [classify, "cross_entropy"])
def test_rolled_labels_behind_a_draw_are_found(loss: Any, dtype: torch.dtype) -> None:
    function = classify if callable(loss) else inlined

    def body(model: nn.Module, batch: Any) -> torch.Tensor:
        return function(model, {"x": batch["x"], "y": batch["y"].roll(1)})

    rows = judged(draw(body), loss=loss, dtype=dtype)
    # The last bias's gradient is a sum over rows that does not care which label stands beside which input.
    assert {n for c, n in failed(rows) if c == "step.gradient"} >= {"first.weight", "first.bias", "head.weight"}
    assert {c for c, _ in failed(rows)} == {"step.gradient"}
    if callable(loss):
        assert "moves the rows of 'y' and leaves those of the others" in of(rows, "step.gradient")[0].message


def test_half_of_the_batch_behind_a_draw_is_found_and_named() -> None:
    rows = judged(draw(lambda model, batch: classify(model, {k: v[:4] for k, v in batch.items()})))
    assert outcomes(rows) == {Outcome.FAIL}
    assert "'x' has 4 of its 8 rows" in of(rows, "step.gradient")[0].message
    assert "the same in every step" in of(rows, "step.gradient")[0].message


def test_another_half_in_each_step_warns() -> None:
    def body(model: nn.Module, batch: Any) -> torch.Tensor:
        chosen = torch.randperm(8)[:4]
        return classify(model, {k: v[chosen] for k, v in batch.items()})

    rows = judged(body)
    assert failed(rows) == []
    assert outcomes(rows) == {Outcome.WARN}
    assert "a part of the batch, another one in each step" in of(rows, "step.gradient")[0].message


def test_rows_in_another_order_are_the_same_batch() -> None:
    def body(model: nn.Module, batch: Any) -> torch.Tensor:
        order = torch.randperm(8)
        return classify(model, {k: v[order] for k, v in batch.items()})

    assert outcomes(judged(body)) == {Outcome.PASS}


def test_labels_shuffled_at_random_without_their_inputs_are_found() -> None:
    def body(model: nn.Module, batch: Any) -> torch.Tensor:
        return classify(model, {"x": batch["x"], "y": batch["y"][torch.randperm(8)]})

    assert outcomes(judged(body)) == {Outcome.FAIL}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_augmentation_in_the_step_passes_and_is_said(dropout: float) -> None:
    def body(model: nn.Module, batch: Any) -> torch.Tensor:
        return classify(model, {"x": batch["x"] + 0.1 * torch.randn_like(batch["x"]), "y": batch["y"]})

    rows = judged(body, dropout=dropout)
    assert failed(rows) == []
    assert outcomes(rows) == {Outcome.PASS}
    assert any("makes its batch anew" in r.message for r in of(rows, "step.gradient"))


def test_a_loss_that_the_step_makes_of_draws_is_told_what_to_declare() -> None:
    def body(model: nn.Module, batch: Any) -> torch.Tensor:
        order = torch.randperm(len(batch["x"]))
        scores = model(0.7 * batch["x"] + 0.3 * batch["x"][order])
        return 0.7 * F.cross_entropy(scores, batch["y"]) + 0.3 * F.cross_entropy(scores, batch["y"][order])

    text = "the step draws random numbers that the declared loss does not (randperm): where they make its batch or its "
    text += "loss, as mixup does, declare the loss that draws them"
    wrong = [r.message for r in of(judged(body, dropout=0.0), "step.gradient") if r.outcome is Outcome.FAIL]
    assert wrong
    assert all(message.endswith(text) for message in wrong)
    scaled = of(judged(lambda model, batch: 2 * classify(model, batch), dropout=0.3), "step.gradient")
    assert not any("draws random numbers" in row.message for row in scaled)


def test_wrong_scale_of_an_augmented_step_is_found() -> None:
    def body(model: nn.Module, batch: Any) -> torch.Tensor:
        return 2 * classify(model, {"x": batch["x"] + 0.01 * torch.randn_like(batch["x"]), "y": batch["y"]})

    assert Outcome.PASS not in outcomes(judged(body, dropout=0.0))


def test_inputs_changed_alike_in_every_step_are_another_batch() -> None:
    rows = judged(lambda model, batch: classify(model, {"x": batch["x"] / 255, "y": batch["y"]}))
    assert outcomes(rows) == {Outcome.FAIL}
    assert "capture the batch as the loss gets it" in of(rows, "step.gradient")[0].message


def test_draws_before_every_micro_batch_are_replayed() -> None:
    model, batch = make(0.3, torch.float32)
    halves = [{k: v[:4] for k, v in batch.items()}, {k: v[4:] for k, v in batch.items()}]

    def right(model: nn.Module, batches: Any, context: Any) -> None:
        context.optimizer.zero_grad()
        for micro in batches:
            torch.rand(1)
            (classify(model, micro) / len(batches)).backward()
        context.optimizer.step()

    def summed(model: nn.Module, batches: Any, context: Any) -> None:
        context.optimizer.zero_grad()
        for micro in batches:
            torch.rand(1)
            classify(model, micro).backward()
        context.optimizer.step()

    found = {}
    for step in (right, summed):
        rows = audited(model, batch=halves, loss=classify, step=step,
                       optimizer=torch.optim.SGD(model.parameters(), lr=0.1))  # fmt: skip
        found[step] = outcomes(rows)
    assert found == {right: {Outcome.PASS}, summed: {Outcome.FAIL}}


def test_small_noise_is_no_wrong_scale() -> None:
    """Draws that cannot be replayed differ a little in length as well: that is no factor."""

    def noisy(model: nn.Module, batch: Any) -> torch.Tensor:
        return classify(model, {"x": batch["x"] + 0.01 * torch.randn_like(batch["x"]), "y": batch["y"]})

    def body(model: nn.Module, batch: Any) -> torch.Tensor:
        noise = torch.randn(8, 9, dtype=batch["x"].dtype)[:, :6]  # inlined, drawn in another shape
        return F.cross_entropy(model(batch["x"] + 0.01 * noise), batch["y"])

    rows = judged(body, loss=noisy, dropout=0.0)
    assert failed(rows) == []
    assert Outcome.INCONCLUSIVE in outcomes(rows)
    wrong = judged(lambda model, batch: 2 * body(model, batch), loss=noisy, dropout=0.0)
    assert ("step.gradient", "first.weight") in failed(wrong)


def test_open_gradients_leave_the_version_open() -> None:
    model, batch = make(0.3, torch.float32)

    def body(model: nn.Module, batch: Any) -> torch.Tensor:  # another dropout than the declared loss's
        x = torch.tanh(model.first(batch["x"]))  # type: ignore[operator]
        return F.cross_entropy(model.head(x * (torch.rand(8, 16) > 0.3) / 0.7), batch["y"])  # type: ignore[operator]

    recipe = Recipe.capture(model, batch=batch, loss=classify, step=step_with(body),
                            optimizer=torch.optim.SGD(model.parameters(), lr=0.1))  # fmt: skip
    report = audit(model, recipe, device="cpu")
    assert report.outcome is Outcome.INCONCLUSIVE
    assert "step drew random numbers in another order" in report.headline


class Losses:
    """Losses that are no plain functions."""

    def __call__(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return classify(model, batch)

    def method(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return classify(model, batch)


def weighted(weight: float, model: nn.Module, batch: Any, *, power: int = 1) -> torch.Tensor:
    return weight * classify(model, batch) ** power


@pytest.mark.parametrize("loss", [Losses(), Losses().method, functools.partial(weighted, 2.0, power=2)],
                         ids=["object", "method", "partial"])  # fmt: skip
def test_every_kind_of_callable_is_seen_with_its_batch(loss: Any) -> None:
    def augmented(model: nn.Module, batch: Any) -> torch.Tensor:
        return loss(model, {"x": batch["x"] + 0.1 * torch.randn_like(batch["x"]), "y": batch["y"]})

    assert outcomes(judged(draw(loss), loss=loss)) == {Outcome.PASS}
    rows = judged(augmented, loss=loss)
    assert outcomes(rows) == {Outcome.PASS}
    assert any("makes its batch anew" in r.message for r in of(rows, "step.gradient"))
    rolled = judged(lambda m, b: loss(m, {"x": b["x"], "y": b["y"].roll(1)}), loss=loss)
    assert any("moves the rows of 'y'" in r.message for r in of(rolled, "step.gradient") if r.outcome is Outcome.FAIL)
