"""Health never fails a version; it warns of what it says it warns of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from audits.health import HEALTH_CHECKS, check_health
from audits.outcomes import Outcome, ResultRow, Severity
from audits.recipe import Recipe
from audits.settings import AuditSettings
from audits.subject import open_subject
from tests.wrong_on_purpose.updates import models


def health(model: nn.Module, batch: Any, *, lr: float = 1e-3, settings: AuditSettings | None = None) -> list[ResultRow]:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    recipe = Recipe.capture(model, batch=batch, loss=models.classify, optimizer=optimizer)
    with open_subject(model, recipe, settings, device="cpu") as subject:
        return check_health(subject)


def warned(rows: list[ResultRow]) -> set[tuple[str, str | None]]:
    return {(r.check, r.parameter or r.module) for r in rows if r.outcome is Outcome.WARN}


def chain(*layers: nn.Module) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return nn.Sequential(*layers), {"x": torch.randn(16, 8), "y": torch.randint(0, 3, (16,))}


def test_healthy_model_has_no_warning() -> None:
    rows = health(*models.conv())
    assert warned(rows) == set()
    assert {r.severity for r in rows} == {Severity.WARN}
    assert {r.check for r in rows} <= {check.name for check in HEALTH_CHECKS}


def test_vanishing_gradient_warns_of_the_first_layer() -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(8, 8)]
    for _ in range(12):
        layers += [nn.Sigmoid(), nn.Linear(8, 8)]
    rows = health(*chain(*layers, nn.Linear(8, 3)))
    assert ("health.vanishing", "0.weight") in warned(rows)


def test_exploding_gradient_warns() -> None:
    torch.manual_seed(0)
    model, batch = chain(nn.Linear(8, 8), nn.Linear(8, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(200)
    assert ("health.exploding", "0.weight") in warned(health(model, batch))
    assert ("health.exploding", "0.weight") not in warned(
        health(model, batch, settings=AuditSettings(exploding_norm=1e9))
    )


def test_dead_relu_and_all_zero_gradient_warn() -> None:
    torch.manual_seed(0)
    model, batch = chain(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    found = warned(health(model, batch))
    assert ("health.dead-relu", "ReLU (1)") in found
    assert ("health.all-zero", "0.weight") in found


def test_saturated_tanh_warns() -> None:
    torch.manual_seed(0)
    model, batch = chain(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    with torch.no_grad():
        model[0].weight.mul_(100)
    assert ("health.saturation", "Tanh (1)") in warned(health(model, batch))


def test_step_that_is_large_against_the_weight_warns() -> None:
    model, batch = models.mlp()
    assert ("health.update-ratio", "head.weight") in warned(health(model, batch, lr=50.0))
    assert not any(check == "health.update-ratio" for check, _ in warned(health(model, batch)))


def test_health_can_be_narrowed_and_leaves_the_model() -> None:
    model, batch = models.mlp()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    rows = health(model, batch, settings=AuditSettings(checks=("health.exploding",), parameters=("head.*",)))
    assert {r.check for r in rows} == {"health.exploding"}
    assert {r.parameter for r in rows} == {"head.weight", "head.bias"}
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert health(model, batch, settings=AuditSettings(checks=("update.*",))) == []


def test_a_complex_gradient_counts_with_its_imaginary_part() -> None:
    """The real part of this one is zero."""
    model = nn.Module()
    model.spectrum = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    batch = {"x": torch.tensor([1.0, 2.0, 2.0])}

    def loss(m: Any, b: Any) -> torch.Tensor:
        return (b["x"] * m.spectrum.imag).sum()

    recipe = Recipe.capture(model, batch=batch, loss=loss, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with open_subject(model, recipe, device="cpu") as subject:
        (row,) = [r for r in check_health(subject) if r.check == "health.all-zero"]
    assert row.outcome is Outcome.PASS
    assert row.gradient_norm == pytest.approx(3.0)
