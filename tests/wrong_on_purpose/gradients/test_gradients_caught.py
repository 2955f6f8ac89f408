"""Bugs that must be caught, beside their correct twins, with the tensor, the module and the Function named."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from audits.outcomes import Outcome
from tests.audits.gradients.cases import (
    Activation,
    BiasOnly,
    FlippedSwish,
    NegativeSwish,
    RowSwish,
    ScaledSwish,
    Swish,
    TermSwish,
    audit,
    classes,
    failing,
    net,
    outcomes,
)

UPSTREAM = {"0.weight", "0.bias"}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("function", [ScaledSwish, FlippedSwish, NegativeSwish, RowSwish, TermSwish])
def test_wrong_functions_are_named(function: type, seed: int) -> None:
    torch.manual_seed(seed)
    rows = audit(net(Activation(function)), classes(), method="probe", seed=seed)
    assert failing(rows) == UPSTREAM
    for row in rows:
        if row.outcome is Outcome.FAIL:
            assert function.__name__ in row.message
            assert "Activation (1)" in row.message
            assert function.__name__ in (row.where_to_look or "")
            assert row.error > row.threshold


@pytest.mark.parametrize("seed", range(3))
def test_right_function_passes(seed: int) -> None:
    torch.manual_seed(seed)
    assert set(outcomes(audit(net(Activation(Swish)), classes(), method="probe", seed=seed)).values()) == {Outcome.PASS}


def test_only_the_bias_is_wrong() -> None:
    rows = audit(net(BiasOnly()), classes(), method="probe")
    assert failing(rows) == {"1.bias"}
    assert "HandLinear" in next(row.message for row in rows if row.parameter == "1.bias")


@pytest.mark.parametrize("factor", [1.001, 0.5, 0.0, -1.0])
def test_a_hook_on_one_tensor_fails_that_tensor(factor: float) -> None:
    model = net(nn.ReLU())
    model[2].weight.register_hook(lambda g: factor * g)
    rows = audit(model, classes(), method="probe")
    assert failing(rows) == {"2.weight"}
    row = next(row for row in rows if row.parameter == "2.weight")
    assert "hook" in row.message
    assert row.module == "Linear (2)"


def test_one_wrong_element_is_found() -> None:
    model = net(nn.Tanh(), 40)

    def flip(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient.view(-1)[1234] *= -1
        return gradient

    model[2].weight.register_hook(flip)
    rows = audit(model, classes(), method="probe")
    assert failing(rows) == {"2.weight"}
    assert "only element 1234" in next(row.message for row in rows if row.parameter == "2.weight")


@pytest.mark.slow
def test_errors_in_a_pair_of_opposite_sign_are_found() -> None:
    for seed in range(10):
        torch.manual_seed(seed)
        model = net(nn.Tanh())

        def pair(gradient: torch.Tensor) -> torch.Tensor:
            gradient = gradient.clone()
            gradient.view(-1)[5] += 0.01
            gradient.view(-1)[9] -= 0.01
            return gradient

        model[2].weight.register_hook(pair)
        assert failing(audit(model, classes(), method="probe", seed=seed)) == {"2.weight"}


class Detaching(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner, self.how = nn.Linear(12, 12), how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "item":
            return x * torch.tanh(self.inner(x)).std().item()
        y = torch.tanh(self.inner(x))
        if self.how == "detach":
            return x + y.detach() + y
        if self.how == "data":
            return x + y.data + y
        with torch.no_grad():
            z = torch.tanh(self.inner(x))
        return x + z + y


@pytest.mark.parametrize("how", ["detach", "data", "no_grad", "item"])
def test_stop_gradients_are_named_and_can_be_declared(how: str) -> None:
    model, batch = net(Detaching(how)), classes()
    rows = audit(model, batch, method="probe")
    assert failing(rows) == {"0.weight", "0.bias", "1.inner.weight", "1.inner.bias"}
    for row in rows:
        if row.outcome is Outcome.FAIL:
            assert row.cause == "stop-gradient at Detaching (1)"
            assert "stop_gradient" in row.message
    declared = audit(model, batch, method="probe", stop_gradient=("1",))
    assert not failing(declared)
    assert all("stop-gradient" in (row.cause or "") for row in declared if row.parameter in failing(rows))


@pytest.mark.slow
def test_a_declared_stop_gradient_hides_no_other_error() -> None:
    model = nn.Sequential(*net(Detaching("detach")), Activation(TermSwish))
    rows = audit(model, classes(), method="probe", stop_gradient=("1",))
    assert failing(rows) == set(outcomes(rows))


def test_a_fully_stopped_parameter_is_skipped() -> None:
    class Frozenish(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stopped, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.stopped(x).detach())

    # outside of the modules: in the root module itself, whose path is empty
    rows = audit(Frozenish(), classes(), method="probe", stop_gradient=("",))
    assert outcomes(rows)["stopped.weight"] is Outcome.SKIPPED
    assert failing(audit(Frozenish(), classes(), method="probe")) == {"stopped.weight", "stopped.bias"}


def test_straight_through_function_must_be_declared() -> None:
    class Through(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            return torch.sign(x)

        @staticmethod
        def backward(ctx, gradient):  # type: ignore[no-untyped-def]
            return gradient

    batch = classes()
    assert failing(audit(net(Activation(Through)), batch, method="probe")) == UPSTREAM
    rows = audit(net(Activation(Through)), batch, method="probe", expect={"custom_gradient": ["Through"]})
    assert outcomes(rows)["0.weight"] is Outcome.PASS
    assert "the declared gradient of" in next(row.message for row in rows if row.parameter == "0.weight")
    assert "Through" in next(row.message for row in rows if row.parameter == "0.weight")


def test_doubled_gradient_at_a_zero_initialised_layer_shows_displaced() -> None:
    class Doubled(Swish):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):  # type: ignore[no-untyped-def]
            return 2 * gradient

    class Lora(nn.Module):
        def __init__(self, function: type | None) -> None:
            super().__init__()
            self.base = nn.Linear(8, 3).requires_grad_(False)
            self.a, self.b = nn.Parameter(torch.randn(2, 8) / 3), nn.Parameter(torch.zeros(3, 2))
            self.function = function

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a = self.function.apply(self.a) if self.function else self.a
            return self.base(x) + x @ a.T @ self.b.T

    right = audit(Lora(None), classes(), method="probe")
    assert outcomes(right) == {"a": Outcome.PASS, "b": Outcome.PASS, "base.weight": Outcome.SKIPPED,
                               "base.bias": Outcome.SKIPPED}  # fmt: skip
    for method in ("probe", "exact"):
        assert failing(audit(Lora(Doubled), classes(), method=method)) == {"a"}


def test_nan_gradients_fail() -> None:
    loss = lambda m, b: torch.where(m(b["x"]) > 1e9, torch.sqrt(m(b["x"]) * 0), m(b["x"])).mean()  # noqa: E731
    rows = audit(nn.Linear(8, 3), classes(), loss, method="probe")
    assert failing(rows) == {"weight", "bias"}
    assert rows[0].cause == "non-finite gradient"


def test_gan_phases_know_their_own_parameters() -> None:
    from audits.recipe.phases import Phase

    class Gan(nn.Module):
        def __init__(self, middle: nn.Module) -> None:
            super().__init__()
            self.g = nn.Sequential(nn.Linear(4, 12), nn.LeakyReLU(0.2), middle, nn.Linear(12, 8))
            self.d = nn.Sequential(nn.Linear(8, 12), nn.LeakyReLU(0.2), nn.Linear(12, 1))

    def discriminator(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        fake = model.g(torch.randn(16, 4)).detach()
        return F.softplus(-model.d(batch["x"])).mean() + F.softplus(model.d(fake)).mean()

    def generator(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return F.softplus(-model.d(model.g(torch.randn(16, 4)))).mean()

    for function, wrong in ((Swish, set()), (ScaledSwish, {"g.0.weight", "g.0.bias"})):
        model = Gan(Activation(function))
        phases = [
            Phase("discriminator", loss=discriminator, optimizer=torch.optim.Adam(model.d.parameters())),
            Phase("generator", loss=generator, optimizer=torch.optim.Adam(model.g.parameters())),
        ]
        rows = audit(model, {"x": torch.randn(16, 8)}, phases=phases, method="probe")
        assert failing([r for r in rows if r.phase == "generator"]) == wrong
        assert not failing([r for r in rows if r.phase == "discriminator"])
        for row in rows:
            own = row.parameter.startswith(row.phase[0])
            assert (row.outcome is Outcome.SKIPPED) is not own


@pytest.mark.slow
def test_target_network_and_surrogates_are_named_by_their_place() -> None:
    class Agent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.online, self.target = nn.Linear(8, 3), nn.Linear(8, 3)

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            value = model.target(batch["x"]).max(1).values
        return F.smooth_l1_loss(model.online(batch["x"]).gather(1, batch["y"][:, None]).squeeze(1), value)

    rows = audit(Agent(), classes(), loss, method="probe")
    assert failing(rows) == {"target.weight", "target.bias"}
    assert {row.cause for row in rows if row.outcome is Outcome.FAIL} == {"stop-gradient at Linear (target)"}
    for scope in ("target", "loss"):
        declared = outcomes(audit(Agent(), classes(), loss, method="probe", stop_gradient=(scope,)))
        assert declared["target.weight"] is Outcome.SKIPPED
        assert declared["online.weight"] is Outcome.PASS

    class Hard(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.gumbel_softmax(x, tau=0.7, hard=True)

    rows = audit(net(Hard()), classes(), method="probe")  # straight-through by its structure: no declaration needed
    assert not failing(rows)
    assert {row.cause for row in rows if row.parameter in UPSTREAM} == {"torch's convention"}
    declared = audit(net(Hard()), classes(), method="probe", stop_gradient=("1",))
    assert not failing(declared)
    assert {row.cause for row in declared if row.parameter in UPSTREAM} == {"declared stop-gradient at Hard (1)"}
