"""Health never fails a version; it warns of what it says it warns of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from audits.checks.health import CHECKS
from audits.health import check_health
from audits.live.subject import open_subject
from audits.outcomes import Outcome, ResultRow, Severity
from audits.recipe.recipe import Recipe
from audits.settings import AuditSettings
from tests.wrong_on_purpose.updates import models


def health(
    model: nn.Module,
    batch: Any,
    *,
    lr: float = 1e-3,
    settings: AuditSettings | None = None,
    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD,
    clip_grad_norm: float | None = None,
) -> list[ResultRow]:
    held = optimizer(model.parameters(), lr=lr)
    recipe = Recipe.capture(
        model, batch=batch, loss=models.classify, optimizer=held, clip_grad_norm=clip_grad_norm
    )  # fmt: skip
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
    assert {r.check for r in rows} <= {check.name for check in CHECKS}


def test_vanishing_gradient_warns_of_the_first_layer() -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(8, 8)]
    for _ in range(12):
        layers += [nn.Sigmoid(), nn.Linear(8, 8)]
    rows = health(*chain(*layers, nn.Linear(8, 3)))
    assert ("health.vanishing", "0.weight") in warned(rows)


def test_vanishing_goes_by_the_order_of_the_forward() -> None:
    class Backwards(nn.Module):
        """Registered last to first."""

        def __init__(self, layers: list[nn.Module]) -> None:
            super().__init__()
            self.layers = nn.ModuleList(reversed(layers))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in reversed(self.layers):
                x = layer(x)
            return x

    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(8, 8)]
    for _ in range(12):
        layers += [nn.Sigmoid(), nn.Linear(8, 8)]
    layers.append(nn.Linear(8, 3))
    _, batch = chain()
    found = warned(health(Backwards(layers), batch))
    assert ("health.vanishing", f"layers.{len(layers) - 1}.weight") in found


@pytest.mark.parametrize(("lr", "clip", "warns"), [(0.1, None, True), (0.1, 1.0, False), (1e-4, None, False)])
def test_exploding_gradient_warns_where_nothing_bounds_the_step(lr: float, clip: float | None, warns: bool) -> None:
    torch.manual_seed(0)
    model, batch = chain(nn.Linear(8, 8), nn.Linear(8, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(200)
    found = warned(health(model, batch, lr=lr, clip_grad_norm=clip))
    assert (("health.exploding", "0.weight") in found) is warns
    allowed = AuditSettings(exploding_norm=1e9)
    assert ("health.exploding", "0.weight") not in warned(health(model, batch, lr=lr, settings=allowed))


def test_a_large_gradient_before_a_normalised_step_is_no_warning() -> None:
    torch.manual_seed(0)
    model, batch = chain(nn.Linear(8, 8), nn.Linear(8, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(200)
    rows = health(model, batch, lr=1e-3, optimizer=torch.optim.Adam)
    assert not {r for r in warned(rows) if r[0] in ("health.exploding", "health.update-ratio")}


def test_a_gradient_that_is_not_finite_warns_whatever_the_optimizer() -> None:
    torch.manual_seed(0)
    model, batch = chain(nn.Linear(8, 8), nn.Linear(8, 3))
    batch["x"][0, 0] = torch.inf
    found = warned(health(model, batch, optimizer=torch.optim.Adam))
    assert ("health.exploding", "0.weight") in found


def test_adams_first_step_on_small_weights_is_no_warning_and_a_large_rate_is() -> None:
    torch.manual_seed(0)
    model, batch = chain(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    with torch.no_grad():
        model[2].weight.mul_(0.01)  # moved by half of itself at 1e-3
    for lr, expected in ((1e-3, False), (0.3, True)):
        found = {check for check, _ in warned(health(model, batch, lr=lr, optimizer=torch.optim.Adam))}
        assert ("health.update-ratio" in found) is expected


def test_dead_relu_and_all_zero_gradient_warn() -> None:
    torch.manual_seed(0)
    model, batch = chain(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    found = warned(health(model, batch))
    assert ("health.dead-relu", "ReLU (1)") in found
    assert ("health.all-zero", "0.weight") in found


def test_units_of_a_narrow_net_that_are_off_by_chance_are_no_warning() -> None:
    torch.manual_seed(0)
    model, batch = chain(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():  # five units never on, three never off, as when all examples look alike
        model[0].bias.copy_(torch.tensor([-100.0] * 5 + [100.0] * 3))
    assert not {check for check, _ in warned(health(model, batch))} & {"health.dead-relu"}
    model, batch = chain(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
    with torch.no_grad():
        model[0].bias[:20] = -100.0  # the others come and go
    assert ("health.dead-relu", "ReLU (1)") in warned(health(model, batch))


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
