"""The arithmetic against independent oracles: mpmath, closed forms, repeated draws."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from audits.gradients.methods.noise import ESTIMATE_CAUTION, VALUES, difference_noise, measure_noise
from audits.gradients.methods.probe import MISS_FACTOR, Prober, limit_factor
from audits.gradients.methods.romberg import romberg, romberg_at
from audits.lanes.directions import values_of
from audits.lanes.evaluation import Point
from audits.lanes.problem import Problem
from tests.audits.gradients.cases import audit


def test_exact_mode_gives_the_hand_derived_gradient() -> None:
    """Logistic regression: ``dL/dw = mean (sigmoid(w x + b) - y) x`` in 50 digits."""
    torch.manual_seed(7)
    model = nn.Linear(1, 1)
    x, y = torch.randn(9, 1), torch.randint(0, 2, (9, 1)).float()
    loss = lambda m, b: nn.functional.binary_cross_entropy_with_logits(m(b["x"]), b["y"])  # noqa: E731
    rows = {row.parameter: row for row in audit(model, {"x": x, "y": y}, loss, method="exact")}
    mpmath.mp.dps = 50
    weight, bias = mpmath.mpf(model.weight.item()), mpmath.mpf(model.bias.item())
    errors = [
        (1 / (1 + mpmath.exp(-(weight * a + bias))) - t, a)
        for a, t in zip(x.flatten().tolist(), y.flatten().tolist(), strict=True)
    ]
    exact = {"weight": sum(e * a for e, a in errors) / 9, "bias": sum(e for e, _ in errors) / 9}
    for name, value in exact.items():
        assert abs(rows[name].expected - float(value)) <= rows[name].threshold
        assert rows[name].measured == pytest.approx(float(value), rel=1e-13)


@pytest.mark.parametrize("sigma", [1e-13, 1e-10, 1e-6])
def test_noise_is_found_within_a_factor_of_four(sigma: float) -> None:
    """One estimate from two tables of six values, as the check takes it."""
    generator = np.random.default_rng(1)
    tables = 1.0 + 3e-9 * np.arange(VALUES) + sigma * generator.standard_normal((400, 2, VALUES))
    ratios = [ESTIMATE_CAUTION * difference_noise(*(t.tolist() for t in two)) / sigma for two in tables]
    assert np.quantile(ratios, 0.01) > 0.25
    assert np.quantile(ratios, 0.95) < 4
    assert 0.7 < float(np.median(ratios)) < 1.6


def test_noise_of_a_smooth_function_is_its_rounding() -> None:
    function = lambda t: math.exp(math.sin(1 + t))  # noqa: E731
    found = measure_noise(lambda at, spacing, n: [function(at + i * spacing) for i in range(n)], 3e-3, 2.0**-53)
    assert 2.0**-53 <= found.sigma <= 16 * 2.0**-53
    assert found.known == {3e-3: function(3e-3), -3e-3: function(-3e-3)}


@given(st.floats(-3, 3), st.floats(0.2, 3))
@settings(max_examples=100, deadline=None)
def test_bound_holds_for_smooth_functions(at: float, rate: float) -> None:
    function = lambda t: math.exp(math.sin(rate * (at + t))) + (at + t) ** 3  # noqa: E731
    derivative = rate * math.cos(rate * at) * math.exp(math.sin(rate * at)) + 3 * at**2
    sigma = 2 * 2.0**-53 * max(1.0, abs(function(0.0)), abs(at) ** 3)
    for estimate in (romberg(function, 3e-3, sigma), romberg(function, 0.5, sigma)):
        assert abs(estimate.value - derivative) <= estimate.bound
    assert romberg(function, 3e-3, sigma).bound < 1e-8 * (1 + abs(derivative))


def test_romberg_is_exact_on_a_quintic() -> None:
    estimate = romberg_at(lambda t: 1 + 2 * t + 3 * t**2 + 4 * t**3 + 5 * t**4 + 6 * t**5, 0.5, 0.0)
    assert estimate.value == pytest.approx(2.0, abs=1e-13)


def test_limit_factor() -> None:
    assert limit_factor(2) == pytest.approx(45, abs=0.2)
    assert limit_factor(1) == pytest.approx(1420)


def test_one_probe_misses_no_more_often_than_said() -> None:
    """``P(|sum s e_i v_i| <= B) <= 1.42 B / ||s e||`` for errors of several shapes, 4,000 draws each."""
    theta = torch.ones(64, dtype=torch.float64, requires_grad=True)
    point = Point(Problem({"t": theta}, lambda: theta.square().sum(), lambda: None))
    prober = Prober(point, seed=1)
    shapes = {"single": torch.eye(64)[3], "pair": torch.eye(64)[3] - torch.eye(64)[5], "all": torch.ones(64),
              "few": (torch.arange(64) < 4).double()}  # fmt: skip
    draws = torch.stack([values_of(prober.direction({"t": 1.0}), "t") for _ in range(4000)])
    assert float(draws.abs().min()) >= 0.5
    assert float(draws.abs().max()) <= 1.5
    for error in shapes.values():
        error = error.double() / error.norm()
        sums = (draws @ error).abs()
        for bound in (0.05, 0.2):
            missed = float((sums <= bound).double().mean())
            assert missed <= MISS_FACTOR * bound + 3 * math.sqrt(MISS_FACTOR * bound / 4000)


@pytest.mark.slow
def test_detection_at_the_stated_limit() -> None:
    """A factor 1 + eps_t on any tensor is found in 99 % of the draws and more."""
    found = total = 0
    for seed in range(30):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 3))
        batch = {"x": torch.randn(12, 8), "y": torch.randint(0, 3, (12,))}
        limits = {row.parameter: row.detection_limit for row in audit(model, batch, method="probe", seed=seed)}
        name = list(limits)[seed % 4]
        model.get_parameter(name).register_hook(lambda g, e=limits[name]: g * (1 + e))
        rows = {row.parameter: row for row in audit(model, batch, method="probe", seed=seed + 1000)}
        total += 1
        found += rows[name].outcome == "fail"
    assert found >= total - 1
