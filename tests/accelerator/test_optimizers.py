"""Every class of torch.optim on a device, fresh and with the state it was captured with, in every implementation."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import audits
from audits.outcomes import Outcome
from tests.accelerator import NAME
from tests.accelerator.comparing import failing

pytestmark = pytest.mark.accelerator

CLASSES = sorted(
    name
    for name, value in vars(torch.optim).items()
    if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
)


def choices() -> list[tuple[str, dict[str, Any]]]:
    """Walk torch.optim: each class with its defaults, and with each flag that chooses another implementation."""
    found: list[tuple[str, dict[str, Any]]] = []
    for name in CLASSES:
        accepted = inspect.signature(getattr(torch.optim, name).__init__).parameters
        found.append((name, {}))
        found += [(name, {flag: True}) for flag in ("fused", "capturable", "nesterov", "amsgrad") if flag in accepted]
        found += [(name, {"foreach": False})] if "foreach" in accepted else []
    return found


class Small(nn.Module):
    """Matrices, biases unless Muon is to hold them, and a 0-dim parameter, whose moments look like counters."""

    def __init__(self, *, matrices_only: bool) -> None:
        super().__init__()
        self.first = nn.Linear(8, 12, bias=not matrices_only)
        self.last = nn.Linear(12, 4, bias=not matrices_only)
        self.scale = None if matrices_only else nn.Parameter(torch.tensor(0.9))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(x))
        return self.last(hidden if self.scale is None else hidden * self.scale)


def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def trained(name: str, options: dict[str, Any], steps: int, device: str) -> tuple[nn.Module, audits.Recipe]:
    """Train a model made on the device for so many steps, and capture how."""
    torch.manual_seed(0)
    if name == "SparseAdam":
        model: nn.Module = nn.EmbeddingBag(50, 3, sparse=True)
        batch = {"x": torch.randint(0, 50, (6, 4)), "y": torch.randint(0, 3, (6,))}
    else:
        model = Small(matrices_only=name == "Muon")
        batch = {"x": torch.randn(20, 8), "y": torch.randint(0, 4, (20,))}
    model, batch = model.to(device), {k: v.to(device) for k, v in batch.items()}
    if name == "SGD":
        options = {"lr": 0.1, "momentum": 0.9, **options}
    optimizer = getattr(torch.optim, name)(model.parameters(), **options)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss(model, batch)
        value.backward()
        return value

    for _ in range(steps):
        optimizer.step(closure)
    return model, audits.Recipe.capture(model, batch=batch, loss=loss, optimizer=optimizer)


@pytest.mark.sampled("name", "options", "steps")
@pytest.mark.parametrize("steps", [0, 3], ids=["fresh", "captured"])
@pytest.mark.parametrize(("name", "options"), choices(), ids=lambda value: str(value))
def test_healthy_on_the_device(name: str, options: dict[str, Any], steps: int) -> None:
    model, recipe = trained(name, options, steps, NAME)
    report = audits.audit(model, recipe, device=NAME)
    wrong = [r for r in report.rows if r.outcome is Outcome.FAIL and r.cause != "environment"]
    assert [r.message for r in wrong] == []
    assert not any(r.check == "audit.completed" for r in report.rows), failing(report)
    if "capturable" in options:
        return  # torch has no such kernel on the CPU to compare with
    other = audits.audit(*trained(name, options, steps, "cpu"), device="cpu")
    assert (report.outcome, report.coverage) == (other.outcome, other.coverage)


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["AdamW", "SGD", "NAdam"])
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Small(matrices_only=False).to(NAME, dtype)
    batch = {"x": torch.randn(20, 8, device=NAME, dtype=dtype), "y": torch.randint(0, 4, (20,), device=NAME)}
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    report = audits.audit(model, audits.Recipe.capture(model, batch=batch, loss=loss, optimizer=optimizer), device=NAME)
    assert [r.message for r in report.rows if r.outcome is Outcome.FAIL and r.cause != "environment"] == []
    assert report.coverage == 1.0


def test_a_wrong_rule_is_found_from_captured_state() -> None:
    class Halved(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            before = [p.detach().clone() for group in self.param_groups for p in group["params"]]
            found = super().step(closure)
            with torch.no_grad():
                for p, old in zip((p for g in self.param_groups for p in g["params"]), before, strict=True):
                    p.copy_((p + old) / 2)
            return found

    model, _ = trained("SGD", {}, 0, NAME)
    batch = {"x": torch.randn(20, 8), "y": torch.randint(0, 4, (20,))}
    optimizer = Halved(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        loss(model, {k: v.to(NAME) for k, v in batch.items()}).backward()
        optimizer.step()
    recipe = audits.Recipe.capture(model, batch=batch, loss=loss, optimizer=optimizer, expect={"optimizer": "SGD"})
    report = audits.audit(model, recipe, device=NAME)
    found = {r.parameter for r in report.rows if r.check == "update.rule" and r.outcome is Outcome.FAIL}
    assert found == {n for n, _ in model.named_parameters()}
