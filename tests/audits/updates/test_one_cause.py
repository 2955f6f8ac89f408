"""One mistake is one kind of finding, with its own cure: an optimizer that holds too much, a zero_grad forgotten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss, softplus

from audits import AuditReport, AuditSettings, Outcome, Phase, Recipe, audit


class Gan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 16), nn.Sigmoid())
        self.discriminator = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.discriminator(x)
        return y


def discriminator_loss(model: Gan, batch: Any) -> torch.Tensor:
    fake = model.generator(batch["z"]).detach()
    return softplus(-model(batch["x"])).mean() + softplus(model(fake)).mean()


def generator_loss(model: Gan, batch: Any) -> torch.Tensor:
    return softplus(-model(model.generator(batch["z"]))).mean()


def _train(model: Gan, batch: Any, context: Any, *zeroed: str) -> None:
    losses = {"discriminator": discriminator_loss, "generator": generator_loss}
    for phase, loss in losses.items():
        if phase in zeroed:
            context.optimizers[phase].zero_grad()
        loss(model, batch).backward()
        context.optimizers[phase].step()


def right_step(model: Gan, batch: Any, context: Any) -> None:
    _train(model, batch, context, "discriminator", "generator")


def generator_not_zeroed(model: Gan, batch: Any, context: Any) -> None:
    _train(model, batch, context, "discriminator")


def discriminator_not_zeroed(model: Gan, batch: Any, context: Any) -> None:
    _train(model, batch, context, "generator")


def audited(
    step: Callable[..., None] | None, dtype: torch.dtype, *, too_much: bool = False, expect: Any = None, **settings: Any
) -> AuditReport:
    torch.manual_seed(0)
    model = Gan().to(dtype)
    batch = {"x": torch.rand(16, 16, dtype=dtype), "z": torch.randn(16, 4, dtype=dtype)}
    held = model if too_much else model.discriminator
    phases = [
        Phase("discriminator", loss=discriminator_loss, optimizer=torch.optim.Adam(held.parameters(), lr=1e-3)),
        Phase("generator", loss=generator_loss, optimizer=torch.optim.Adam(model.generator.parameters(), lr=1e-3)),
    ]
    recipe = Recipe.capture(model, batch=batch, phases=phases, step=step, expect=expect)
    return audit(model, recipe, settings=AuditSettings(**settings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_right_step_passes(dtype: torch.dtype) -> None:
    report = audited(right_step, dtype)
    assert report.outcome is Outcome.PASS, str(report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("step", [right_step, None])
def test_an_optimizer_that_holds_too_much_is_one_kind_of_finding(step: Any, dtype: torch.dtype) -> None:
    report = audited(step, dtype, too_much=True)
    assert report.failed_checks == ["update.isolation"]
    assert set(report.failed_parameters) == {f"generator.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    told = report.findings
    assert {row.check for row in told} == {"update.isolation"}
    assert not any("stop_gradient" in row.message for row in told)
    assert report.coverage == 1.0, "the generator is judged in its own phase"
    left = [row for row in report.rows if "see update.isolation" in row.message]
    assert {row.phase for row in left} == {"discriminator"}


@pytest.mark.sampled(cases=1)
@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"expect": {"shared": ["generator.*"]}}, {"severity": {"update.isolation": "warn"}}],
)
def test_what_is_meant_or_only_warned_of_is_judged_in_both_phases(options: Any) -> None:
    report = audited(right_step, torch.float32, too_much=True, **options)
    stopped = [r for r in report.findings if r.check == "gradient.finite-difference" and r.outcome is Outcome.FAIL]
    assert {row.phase for row in stopped} == {"discriminator"}
    assert all("stop_gradient" in row.message for row in stopped)


@pytest.mark.slow
@pytest.mark.sampled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("step", "phase", "left"),
    [
        (generator_not_zeroed, "generator", "the gradient of step 1 was added (zero_grad is missing)"),
        (
            discriminator_not_zeroed,
            "discriminator",
            "the gradients of phase 'generator' in step 1 and of step 1 were left over and added (zero_grad is",
        ),
    ],
)
def test_a_forgotten_zero_grad_names_what_was_left(step: Any, phase: str, left: str, dtype: torch.dtype) -> None:
    report = audited(step, dtype)
    assert report.failed_checks == ["step.gradient"]
    wrong = [row for row in report.findings if row.check == "step.gradient"]
    assert {row.phase for row in wrong} == {phase}
    assert all(left in row.message for row in wrong), [row.message for row in wrong]


def unzeroed(model: nn.Module, batch: Any, context: Any) -> None:
    mse_loss(model(batch["inputs"]), batch["targets"]).backward()
    context.optimizers["step"].step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_twice_as_long_names_the_one_that_was_left(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 3).to(dtype)
    batch = {"inputs": torch.randn(8, 6, dtype=dtype), "targets": torch.randn(8, 3, dtype=dtype)}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)  # so small that both gradients point the same way
    report = audit(model, Recipe.capture(model, batch=batch, loss="mse_loss", optimizer=optimizer, step=unzeroed))
    messages = [row.message for row in report.findings if row.check == "step.gradient"]
    assert messages
    for message in messages:
        assert "the scale is off by a factor" in message
        assert "the gradient of step 1 was added (zero_grad is missing)" in message
