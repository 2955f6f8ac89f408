"""Leaves that reach the loss and are no parameters fail by their path; what a loss makes itself is left alone."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from audits import Recipe, audit
from audits.outcomes import Outcome, ResultRow
from audits.report import AuditReport
from audits.settings import AuditSettings

CHECK = "registration.reaches-loss"

Batch = dict[str, torch.Tensor]


class Holder:
    """An object that is no module."""

    def __init__(self, held: Any) -> None:
        self.held = held


class Net(nn.Module):
    """Two layers, and between them whatever ``middle`` is."""

    def __init__(self, middle: Any = None) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.middle = middle

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(x))
        middle = self.middle
        while isinstance(middle, (list, tuple, Holder)):
            middle = middle.held if isinstance(middle, Holder) else middle[0]
        return self.head(hidden if middle is None else middle(hidden))


def batch(*, requires_grad: bool = False) -> Batch:
    torch.manual_seed(1)
    return {"x": torch.randn(12, 6).requires_grad_(requires_grad), "y": torch.randint(0, 3, (12,))}


def classify(model: nn.Module, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def penalised(model: nn.Module, batch: Batch) -> torch.Tensor:
    """WGAN-GP's penalty: its points are leaves that the loss makes."""
    points = (batch["x"] * torch.rand(12, 1)).detach().requires_grad_()
    (slope,) = torch.autograd.grad(model(points).sum(), points, create_graph=True)
    return classify(model, batch) + (slope.norm(dim=1) - 1).square().mean()


class Remembering(nn.Module):
    """Keeps what it made in its last forward; nothing of that is a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.last: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        points = x.detach().clone().requires_grad_()
        self.last.append(points)
        return self.head(torch.tanh(self.first(points)))


def judged(model: nn.Module, loss: Any = classify, given: Batch | None = None, **options: Any) -> AuditReport:
    optimizer = options.pop("optimizer", None) or torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = Recipe.capture(model, batch=given or batch(), loss=loss, optimizer=optimizer, **options)
    checks = ("registration.*", "gradient.finite-difference", "update.rule")
    return audit(model, recipe, settings=AuditSettings(checks=checks), device="cpu")


def failed(report: AuditReport) -> dict[str | None, str]:
    return {row.parameter: row.message for row in report.rows if row.outcome is Outcome.FAIL and row.check == CHECK}


def rows(report: AuditReport, check: str = CHECK) -> list[ResultRow]:
    return [row for row in report.rows if row.check == check]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("middle", "path"),
    [
        (lambda layer: [layer], "middle.0.weight"),
        (lambda layer: (layer,), "middle.0.weight"),
        (lambda layer: Holder([layer]), "middle.held.0.weight"),
        (lambda layer: lambda x: layer(x), "middle.layer.weight"),
        (lambda layer: functools.partial(F.linear, weight=layer.weight), "middle.weight"),
        (lambda layer: layer.forward, "middle.weight"),
    ],
    ids=["list", "tuple", "object", "closure", "partial", "method"],
)
def test_what_is_not_registered_fails_by_its_path(middle: Any, path: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 8).to(dtype)
    model = Net(middle(layer)).to(dtype)
    given = {"x": batch()["x"].to(dtype), "y": batch()["y"]}
    before = {"weight": layer.weight, "data": layer.weight.detach().clone(), "at": layer.weight.data_ptr()}
    report = judged(model, given=given)
    found = failed(report)
    assert path in found
    assert path in found[path]
    assert "never trained" in found[path]
    # nothing of it hides behind a text about dtypes, and the layer is as it was
    assert all(row.outcome is Outcome.PASS for row in rows(report, "gradient.finite-difference"))
    assert layer.weight is before["weight"]
    assert layer.weight.data_ptr() == before["at"]
    assert torch.equal(layer.weight, before["data"])
    assert layer.weight.grad is None
    right = judged(Net(nn.Linear(8, 8)).to(dtype), given=given)
    assert failed(right) == {}
    assert [row.outcome for row in rows(right)] == [Outcome.PASS]


def test_a_network_that_the_loss_holds_fails_and_one_in_eval_mode_warns() -> None:
    torch.manual_seed(0)
    extra = nn.Linear(3, 3)

    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        return F.cross_entropy(extra(model(batch["x"])), batch["y"])

    assert set(failed(judged(Net(), loss))) == {"loss.extra.weight", "loss.extra.bias"}
    extra.eval()
    report = judged(Net(), loss)
    assert failed(report) == {}
    assert {row.parameter for row in rows(report) if row.outcome is Outcome.WARN} == {
        "loss.extra.weight", "loss.extra.bias",
    }  # fmt: skip
    extra.requires_grad_(False)
    assert [row.outcome for row in rows(judged(Net(), loss))] == [Outcome.PASS]


class Centred(nn.Module):
    """A loss with a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.layer(output), target)


def test_a_loss_that_learns_is_trained_or_fails() -> None:
    torch.manual_seed(0)
    model, loss = Net(), Centred()
    assert set(failed(judged(model, loss))) == {"loss.layer.weight", "loss.layer.bias"}
    both = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1)
    report = judged(model, loss, optimizer=both)
    assert failed(report) == {}
    stale = rows(report, "registration.stale")
    assert {(row.parameter, row.outcome) for row in stale} == {
        ("loss.layer.weight", Outcome.WARN), ("loss.layer.bias", Outcome.WARN),
    }  # fmt: skip


def test_what_is_declared_frozen_passes() -> None:
    torch.manual_seed(0)
    model = Net([nn.Linear(8, 8)])
    assert failed(judged(model, expect={"frozen": ["middle.*"]})) == {}


@pytest.mark.parametrize("requires_grad", [False, True])
def test_points_of_a_penalty_and_batches_that_require_a_gradient_are_left_alone(requires_grad: bool) -> None:
    torch.manual_seed(0)
    report = judged(Net(), penalised, batch(requires_grad=requires_grad))
    assert [row.outcome for row in rows(report)] == [Outcome.PASS]


def test_what_a_forward_keeps_of_its_own_making_is_left_alone() -> None:
    torch.manual_seed(0)
    assert [row.outcome for row in rows(judged(Remembering()))] == [Outcome.PASS]
    model = Remembering()
    classify(model, batch()).backward()  # the last batch of a training that is over
    assert [row.outcome for row in rows(judged(model))] == [Outcome.PASS]
