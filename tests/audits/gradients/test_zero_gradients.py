"""Parameters the loss does not use, and biases whose gradient cancels: told as what they are, and told apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from audits import AuditReport, Outcome, Recipe, audit

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def audited(model: nn.Module, batch: Any, loss: Any) -> AuditReport:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    return audit(model, Recipe.capture(model, batch=batch, loss=loss, optimizer=optimizer), device="cpu")


def of(report: AuditReport, check: str, name: str) -> list[tuple[Outcome, str | None]]:
    return [(r.outcome, r.cause) for r in report.rows if (r.check, r.parameter) == (check, name)]


class Pooled(nn.Module):
    """A body with a head and a pooler that the loss may leave out, or use behind a detach."""

    def __init__(self, use: str, unused: int = 1) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.pooler = nn.Sequential(*(nn.Linear(8, 8) for _ in range(unused)))
        self.use = use

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.body(x))
        if self.use == "used":
            h = h + self.pooler(h)
        elif self.use == "detached":
            h = h + self.pooler(h).detach()
        return self.head(h)


def batch_of(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(16, 6, dtype=dtype), "y": torch.randint(0, 3, (16,))}


@DTYPES
def test_an_unused_parameter_is_one_warning_outside_coverage(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    report = audited(Pooled("unused").to(dtype), batch_of(dtype), "cross_entropy")
    assert report.outcome is Outcome.WARN
    assert report.coverage == 1.0
    assert set(report.coverage_of.silent) == {"pooler.0.weight", "pooler.0.bias"}
    warned = [r for r in report.rows if r.outcome not in (Outcome.PASS, Outcome.SKIPPED)]
    assert [(r.check, r.outcome, r.parameter) for r in warned] == [("registration.reaches-loss", Outcome.WARN, None)]
    assert all(name in warned[0].message for name in ("pooler.0.weight", "pooler.0.bias", "requires_grad_(False)"))
    assert set(of(report, "step.gradient-present", "pooler.0.bias")) == {(Outcome.SKIPPED, "not used by the loss")}
    assert set(of(report, "update.rule", "pooler.0.weight")) == {(Outcome.SKIPPED, "not used by the loss")}


@pytest.mark.slow
@DTYPES
def test_its_twins_are_used_or_cut_off(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    assert audited(Pooled("used").to(dtype), batch_of(dtype), "cross_entropy").outcome is Outcome.PASS
    report = audited(Pooled("detached").to(dtype), batch_of(dtype), "cross_entropy")
    assert report.outcome is Outcome.FAIL
    assert {"pooler.0.weight", "pooler.0.bias"} <= set(report.failed_parameters)


def test_a_model_most_of_which_is_unused_is_not_covered() -> None:
    torch.manual_seed(0)
    report = audited(Pooled("unused", unused=3), batch_of(torch.float32), "cross_entropy")
    assert report.outcome is Outcome.INCONCLUSIVE


def hinge(model: nn.Module, batch: Any) -> torch.Tensor:
    real, fake = model(batch["x"]), model(batch["z"])
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


@DTYPES
def test_a_bias_whose_gradient_cancels_passes_plainly(dtype: torch.dtype) -> None:
    """Within its margins a hinge pulls real and fake apart equally: the last bias has a gradient of zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1)).to(dtype)
    batch = {"x": torch.randn(8, 6, dtype=dtype) / 4, "z": torch.randn(8, 6, dtype=dtype) / 4}
    report = audited(model, batch, hinge)
    assert report.outcome is Outcome.PASS
    assert (Outcome.SKIPPED, "cancels") in of(report, "health.all-zero", "2.bias")


@DTYPES
def test_a_dead_layer_still_warns(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)
    nn.init.constant_(model[0].bias, -50.0)
    report = audited(model, batch_of(dtype), "cross_entropy")
    for name in ("0.weight", "0.bias", "2.weight"):
        assert of(report, "health.all-zero", name) == [(Outcome.WARN, None)]
