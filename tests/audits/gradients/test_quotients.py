"""Difference quotients of one, two and four values an element, against derivatives known in closed form."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from audits.gradients.methods import exact
from audits.gradients.methods.batched import PlainElements
from audits.gradients.methods.quotients import SAMPLE, Differences
from audits.outcomes import Outcome
from tests.audits.gradients.cases import audit, classes, failing, outcomes

STEP = 3e-3
SIZE = 4 * SAMPLE


class Waves:
    """``f(theta) = sum a_i sin(k_i theta_i) + 1``, with a noise of known standard deviation."""

    def __init__(self, frequency: float, sigma: float, seed: int) -> None:
        self.chance = np.random.default_rng(seed)
        self.k = frequency * self.chance.uniform(0.5, 1.0, SIZE)
        self.a = self.chance.normal(size=SIZE)
        self.theta = self.chance.normal(size=SIZE)
        self.sigma = sigma
        self.evaluated = 0

    @property
    def derivatives(self) -> np.ndarray:
        return np.asarray(self.a * self.k * np.cos(self.k * self.theta))

    @property
    def base(self) -> float:
        return float(1.0 + self.chance.normal(scale=self.sigma))

    def values(self, indices: list[int], step: np.ndarray) -> np.ndarray:
        self.evaluated += len(indices)
        theta, k = self.theta[indices], self.k[indices]
        # sin(x + d) - sin(x) without cancellation, so that all noise is ours
        change = 2 * self.a[indices] * np.cos(k * (theta + step / 2)) * np.sin(k * step / 2)
        return np.asarray(1.0 + change + self.chance.normal(scale=self.sigma, size=len(indices)))

    def moved(self, indices: list[int], step: float) -> np.ndarray:
        return np.full(len(indices), step)


@pytest.mark.parametrize(("wanted", "values"), [(3e-5, 1), (5e-6, 2), (1e-7, 4)])
@pytest.mark.parametrize("seed", range(10))
def test_the_cheapest_difference_whose_bound_is_wanted(wanted: float, values: int, seed: int) -> None:
    waves = Waves(1.0, 1e-12, seed)
    differences = Differences(cast("PlainElements", waves), STEP, waves.sigma)
    differences.sample(list(range(0, SIZE, SIZE // SAMPLE)), wanted)
    waves.evaluated = 0
    estimates = differences.of(list(range(SIZE)))
    assert waves.evaluated == values * SIZE
    true = waves.derivatives
    shares = [abs(estimate.value - true[index]) / estimate.bound for index, estimate in enumerate(estimates)]
    assert 0.05 < max(shares) <= 1.0  # a bound that held by being far too wide would hide a wrong gradient
    if values < 4:
        assert max(estimate.bound for estimate in estimates) <= wanted


def test_noise_alone_stays_within_the_bound() -> None:
    """A loss at an offset of 1e9: nearly all of the error is noise, which no step makes small."""
    waves = Waves(1.0, 1e-7, 0)
    differences = Differences(cast("PlainElements", waves), STEP, waves.sigma)
    differences.sample(list(range(0, SIZE, SIZE // SAMPLE)), 1e-2)
    for estimate, true in zip(differences.of(list(range(SIZE))), waves.derivatives, strict=True):
        assert abs(estimate.value - true) <= estimate.bound


def scaled(index: int, factor: float) -> Any:
    def hook(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient.view(-1)[index] *= factor
        return gradient

    return hook


@pytest.fixture(params=["vmap", "loop"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "loop":
        monkeypatch.setattr(exact, "batched_elements", lambda *_: None)
    return str(request.param)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_wrong_element_that_no_sample_saw(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batch = {"x": torch.randn(16, 8, dtype=dtype), "y": classes()["y"]}
    first = nn.Linear(8, 30)
    model = nn.Sequential(first, nn.Tanh(), nn.Linear(30, 3)).to(dtype)
    assert set(outcomes(audit(model, batch, method="exact")).values()) == {Outcome.PASS}
    first.weight.register_hook(scaled(1, 1.001))
    rows = audit(model, batch, method="exact")
    assert failing(rows) == {"0.weight"}
    assert "element 1 " in next(row.message for row in rows if row.parameter == "0.weight")


class OneSteep(nn.Module):
    """A loss that is linear in all elements but number 77, which no sample of 64 out of 192 holds."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 192, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight * x).mean() + torch.sin(400 * self.weight[77]) / 400


def value(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(batch["x"])  # type: ignore[no-any-return]


@pytest.mark.usefixtures("way")
def test_an_element_steeper_than_its_sample_is_judged_by_itself() -> None:
    model, batch = OneSteep(), {"x": torch.randn(4, 192, dtype=torch.float64)}
    assert set(outcomes(audit(model, batch, value, method="exact")).values()) == {Outcome.PASS}
    model.weight.register_hook(scaled(77, 1.001))
    rows = audit(model, batch, value, method="exact")
    assert failing(rows) == {"weight"}
    assert "element 77 " in rows[0].message
