"""What a stop-gradient's failure says: the cause by name, and never a declaration under which the bug would pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from audits.outcomes import Outcome, ResultRow
from tests.audits.gradients.cases import audit, classes, failing, net, outcomes

Loss = Callable[[nn.Module, Any], torch.Tensor]


def wrong(rows: list[ResultRow]) -> list[ResultRow]:
    return [row for row in rows if row.outcome is Outcome.FAIL]


def penalised(how: str, *, create_graph: bool) -> Loss:
    """A critic's loss with a gradient penalty."""

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        x = batch["x"].clone().requires_grad_()
        value = model(x).sum()
        if how == "grad":
            slope = torch.autograd.grad(value, x, create_graph=create_graph, retain_graph=True)[0]
        else:
            torch.autograd.backward(value, inputs=[x], create_graph=create_graph, retain_graph=True)
            assert x.grad is not None
            slope = x.grad
        return model(batch["x"]).mean() + 10 * ((slope.norm(dim=1) - 1) ** 2).mean()

    return loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("how", ["grad", "backward"])
@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True:UserWarning")
def test_a_penalty_without_create_graph_is_named(how: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 1)).to(dtype)
    batch = {"x": classes()["x"].to(dtype)}
    assert not failing(audit(model, batch, penalised(how, create_graph=True), method="probe"))
    for scopes in ((), ("loss",)):  # no declaration hides it
        rows = audit(model, batch, penalised(how, create_graph=False), method="probe", stop_gradient=scopes)
        assert failing(rows) == {"0.weight", "0.bias", "2.weight"}
        for row in wrong(rows):
            assert row.cause == "autograd.grad without create_graph=True in the loss function"
            assert "create_graph=True" in row.message
            assert "test_stops.py:" in row.message
            assert "hook" not in row.message
            assert "stop_gradient" not in row.message


def test_a_gradient_that_is_meant_as_a_constant_is_detached_and_declared() -> None:
    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        fit = F.cross_entropy(model(batch["x"]), batch["y"])
        last = model[-1].weight
        size = torch.autograd.grad(fit, last, retain_graph=True)[0].norm()
        return fit + (1 / (size + 0.1)).detach() * model(batch["x"]).square().mean()

    torch.manual_seed(0)
    model, batch = net(nn.Tanh()), classes()
    assert {row.cause for row in wrong(audit(model, batch, loss, method="probe"))} == {
        "stop-gradient at the loss function"
    }
    assert not failing(audit(model, batch, loss, method="probe", stop_gradient=("loss",)))


class Agent(nn.Module):
    def __init__(self, *, same: str) -> None:
        super().__init__()
        self.online = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3))
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        if same == "module":
            self.target = self.online
        elif same == "parameters":
            self.target[0].weight, self.target[0].bias = self.online[0].weight, self.online[0].bias
            self.target[2].weight, self.target[2].bias = self.online[2].weight, self.online[2].bias


def bellman(how: str) -> Loss:
    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if how == "no_grad":
            with torch.no_grad():
                value = model.target(batch["x"]).max(1).values
        else:
            value = model.target(batch["x"]).max(1).values.detach()
        return F.smooth_l1_loss(model.online(batch["x"]).gather(1, batch["y"][:, None]).squeeze(1), 1 + 0.9 * value)

    return loss


@pytest.mark.parametrize("how", ["no_grad", "detach"])
@pytest.mark.parametrize("same", ["module", "parameters"])
def test_a_target_that_is_the_online_network_is_said_to_be_one_module(same: str, how: str) -> None:
    torch.manual_seed(0)
    rows = audit(Agent(same=same), classes(), bellman(how), method="probe")
    assert failing(rows) == {"online.0.weight", "online.0.bias", "online.2.weight", "online.2.bias"}
    for row in wrong(rows):
        assert "'online' and 'target' are one module" in row.message
        assert "copy.deepcopy" in row.message
        assert "declare stop_gradient" not in row.message
    assert not failing(audit(Agent(same="no"), classes(), bellman(how), method="probe"))


def test_a_layer_listed_twice_is_no_target_network() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
            self.layers = nn.ModuleList([self.inner, self.head])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x + x.detach() * 0.5

    rows = wrong(audit(Listed(), classes(), method="probe"))
    assert rows
    assert all("one module" not in row.message for row in rows)
    assert all("declare stop_gradient=['']" in row.message for row in rows)


class Quantiser(nn.Module):
    """One stage: the nearest code, straight through."""

    def __init__(self, *, trained: bool) -> None:
        super().__init__()
        codes = torch.randn(16, 6)
        if trained:
            self.codes = nn.Parameter(codes)
        else:
            self.register_buffer("codes", codes)

    def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes = self.codes
        code = codes[torch.cdist(z.detach(), codes.detach()).argmin(1)]
        loss = 0.25 * F.mse_loss(z, code.detach())
        if isinstance(codes, nn.Parameter):
            loss = loss + F.mse_loss(code, z.detach())
        return z + (code - z).detach(), loss


class Residual(nn.Module):
    def __init__(self, *, right: bool, trained: bool, in_place: bool = False) -> None:
        super().__init__()
        self.stages = nn.ModuleList(Quantiser(trained=trained) for _ in range(2))
        self.right, self.in_place = right, in_place

    def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rest, out, total = z.clone(), torch.zeros_like(z), z.new_zeros(())
        for stage in self.stages:
            code, loss = stage(rest)
            out, total = out + code, total + loss
            taken = code.detach() if self.right else code
            rest = rest.clone()
            if self.in_place:
                rest -= taken
            else:
                rest = rest - taken
        return out, total


class Autoencoder(nn.Module):
    def __init__(self, quantiser: nn.Module) -> None:
        super().__init__()
        self.encoder, self.quantiser, self.decoder = nn.Linear(8, 6), quantiser, nn.Linear(6, 8)


def reconstruction(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    code, loss = model.quantiser(model.encoder(batch["x"]))
    return F.mse_loss(model.decoder(code), batch["x"]) + loss


ENCODER = {"encoder.weight", "encoder.bias"}


@pytest.mark.slow
@pytest.mark.sampled
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_residual_quantisation_gets_no_declaration_under_which_its_bug_would_pass(
    trained: bool, in_place: bool
) -> None:
    torch.manual_seed(0)
    batch = classes()
    bug = Autoencoder(Residual(right=False, trained=trained, in_place=in_place))
    mend = Autoencoder(Residual(right=True, trained=trained, in_place=in_place))
    for scopes in ((), ("quantiser.stages.0", "quantiser.stages.1"), ("quantiser",)):
        rows = audit(bug, batch, reconstruction, method="probe", stop_gradient=scopes)
        assert failing(rows) >= ENCODER, scopes
        for row in wrong(rows):
            assert "Residual (quantiser)" in row.message
            assert "gradient cancels exactly" in row.message
            assert "test_stops.py:" in row.message
            assert "declare stop_gradient" not in row.message
    undeclared = wrong(audit(mend, batch, reconstruction, method="probe"))
    assert {row.parameter for row in undeclared} >= ENCODER
    for row in undeclared:
        assert "Several stops work together" in row.message
        assert "cannot be told" in row.message
        assert "declare stop_gradient" not in row.message
    assert not failing(audit(mend, batch, reconstruction, method="probe", stop_gradient=("quantiser",)))


def test_a_commitment_loss_without_gradient_is_seen_behind_a_declaration() -> None:
    class Committing(nn.Module):
        def __init__(self, *, right: bool) -> None:
            super().__init__()
            self.register_buffer("codes", torch.randn(16, 6))
            self.right = right

        def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            code = self.codes[torch.cdist(z.detach(), self.codes).argmin(1)]
            through = z + (code - z).detach()
            return through, F.mse_loss(z, through.detach() if self.right else through)

    torch.manual_seed(0)
    batch, scope = classes(), ("quantiser",)
    assert not failing(
        audit(Autoencoder(Committing(right=True)), batch, reconstruction, method="probe", stop_gradient=scope)
    )
    rows = audit(Autoencoder(Committing(right=False)), batch, reconstruction, method="probe", stop_gradient=scope)
    assert failing(rows) == ENCODER
    assert {row.cause for row in wrong(rows)} == {"cancelled gradient at Committing (quantiser)"}


def test_a_difference_that_is_only_measured_is_no_cancellation() -> None:
    class Measuring(nn.Module):
        def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            through = z + (z.round() - z).detach()
            self.distance = (z - through).square().mean()
            return through, z.square().mean()

    torch.manual_seed(0)
    rows = audit(Autoencoder(Measuring()), classes(), reconstruction, method="probe", stop_gradient=("quantiser",))
    assert not failing(rows)
    assert outcomes(rows)["decoder.weight"] is Outcome.PASS
