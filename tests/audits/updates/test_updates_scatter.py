"""A backward that adds in no fixed order, as atomics on a GPU do: measured by repeats, never an alarm."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import nn

from audits import devices
from audits.devices import missing_determinism
from audits.gradients.verdict_rows import parameter_row
from audits.gradients.verdicts import Verdict
from audits.live.subject import open_subject
from audits.outcomes import Lane, Outcome, ResultRow
from audits.recipe.recipe import Recipe
from tests.audits.updates.subjects import audited, of

#: Relative noise of the backward, drawn from no generator that an audit could set; changed per test.
NOISE = {"relative": 0.0}


class Atomics(torch.autograd.Function):
    """The identity, whose gradient scatters."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(int.from_bytes(os.urandom(4), "little"))
        return gradient * (1 + NOISE["relative"] * torch.randn(gradient.shape, generator=generator))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(Atomics.apply(torch.tanh(self.first(x))))


def _loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"])


def right(model: nn.Module, batch: Any, context: Any) -> None:
    context.optimizers["step"].zero_grad()
    _loss(model, batch).backward()
    context.optimizers["step"].step()


def longer(model: nn.Module, batch: Any, context: Any) -> None:
    context.optimizers["step"].zero_grad()
    (1.05 * _loss(model, batch)).backward()
    context.optimizers["step"].step()


def _rows(relative: float, step: Any) -> list[ResultRow]:
    NOISE["relative"] = relative
    torch.manual_seed(0)
    model = Net()
    batch = {"x": torch.randn(64, 8), "y": torch.randint(0, 3, (64,))}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return of(audited(model, batch=batch, loss=_loss, optimizer=optimizer, step=step), "step.gradient")


def test_scatter_that_was_measured_is_no_alarm() -> None:
    rows = {r.parameter: r for r in _rows(2e-3, right)}
    assert {r.outcome for r in rows.values()} == {Outcome.PASS}
    assert "scatters from run to run" in rows["first.weight"].message
    assert rows["last.weight"].message.startswith("last.weight received the declared loss's gradient")
    assert "scatters" not in rows["last.weight"].message


def test_what_scatter_cannot_explain_is_found() -> None:
    wrong = {r.parameter for r in _rows(2e-3, longer) if r.outcome is Outcome.FAIL}
    assert wrong == {"first.weight", "first.bias", "last.weight", "last.bias"}


def test_coarse_scatter_stays_open() -> None:
    rows = {r.parameter: r for r in _rows(0.1, right)}
    assert rows["first.weight"].outcome is Outcome.INCONCLUSIVE
    assert rows["first.weight"].cause == "nondeterministic"
    assert rows["last.weight"].outcome is Outcome.PASS


def test_the_missing_workspace_is_named_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    assert "CUBLAS_WORKSPACE_CONFIG=:4096:8" in missing_determinism(torch.device("cuda"))
    assert missing_determinism(torch.device("cpu")) == ""
    for value in devices.CUBLAS_WORKSPACES:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", value)
        assert missing_determinism(torch.device("cuda")) == ""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    assert missing_determinism(torch.device("cuda"))


def test_a_nondeterministic_loss_names_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    model = Net()
    batch = {"x": torch.randn(4, 8), "y": torch.randint(0, 3, (4,))}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = Recipe.capture(model, batch=batch, loss=_loss, optimizer=optimizer)
    with open_subject(model, recipe, None, device="cpu") as subject:
        verdict = Verdict(outcome=Outcome.INCONCLUSIVE, cause="nondeterministic")

        def message() -> str:
            return parameter_row(
                subject, subject.phases[0], "first.weight", verdict, None, Lane.FLOAT64, "torch.float32"
            ).message

        assert "CUBLAS" not in message()
        monkeypatch.setattr(subject, "device", torch.device("cuda"))
        assert "differs between two evaluations" in message()
        assert "CUBLAS_WORKSPACE_CONFIG" in message()
