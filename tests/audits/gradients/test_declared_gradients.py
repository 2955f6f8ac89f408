"""Custom gradients that are meant to differ: taken as they are, and everything around them judged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from audits.outcomes import Outcome, ResultRow
from tests.audits.gradients.cases import FINITE, audit, failing


class Rounded(torch.autograd.Function):
    """Straight-through."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return (x * 4).round() / 4

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class Spike(torch.autograd.Function):
    """A surrogate: the slope of another function than the forward's."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return gradient / (1 + 10 * x.abs()) ** 2


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return -gradient


class Once(torch.autograd.Function):
    """A backward that cannot be differentiated, as a kernel's."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.sign()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return 0.5 * gradient


class Mixed(torch.autograd.Function):
    """Mixes the columns in its backward, as no elementwise one does."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient - gradient.mean(1, keepdim=True)


class Bound:
    """Called by a name that was bound long before, as tutorials of spiking nets have it."""

    __name__ = "Spike"
    apply = staticmethod(Spike.apply)


class Clipped(torch.autograd.Function):
    """Not linear: what is upstream cannot be judged."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.clamp(-1e-3, 1e-3)


class Wrong(torch.autograd.Function):
    """x sigmoid(x), whose backward forgets a term."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return gradient * torch.sigmoid(x)


class Net(nn.Module):
    def __init__(self, declared: Any, mistake: str = "") -> None:
        super().__init__()
        self.first, self.scale, self.last = nn.Linear(8, 6), nn.Parameter(torch.rand(6) + 0.5), nn.Linear(6, 3)
        self.declared, self.mistake = declared, mistake

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        if self.mistake == "upstream":
            hidden = Wrong.apply(hidden)
        if self.mistake == "stopped":
            hidden = hidden + 0.5 * hidden.detach()
        hidden = self.declared.apply(hidden * self.scale)
        if self.mistake == "downstream":
            hidden = Wrong.apply(hidden)
        return self.last(torch.tanh(hidden))


LINEAR = [Rounded, Spike, Reversed, Once, Mixed, Bound()]
UPSTREAM = ("first.weight", "first.bias", "scale")


def rows_of(declared: Any, mistake: str = "", dtype: torch.dtype = torch.float32, **options: Any) -> list[ResultRow]:
    torch.manual_seed(0)
    batch = {"inputs": torch.randn(12, 8, dtype=dtype), "targets": torch.arange(12) % 3}
    options = {"expect": {"custom_gradient": [declared.__name__]}, **options}
    return audit(Net(declared, mistake).to(dtype), batch, **options)


def by_name(rows: list[ResultRow]) -> dict[str, ResultRow]:
    return {row.parameter: row for row in rows if row.check == FINITE and row.parameter}


@pytest.mark.sampled(cases=10)
@pytest.mark.parametrize("method", ["auto", "probe", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("declared", LINEAR, ids=lambda d: getattr(d, "__qualname__", "Bound"))
def test_everything_around_a_declared_gradient_is_judged(declared: Any, dtype: torch.dtype, method: str) -> None:
    rows = by_name(rows_of(declared, dtype=dtype, method=method))
    assert {row.outcome for row in rows.values()} == {Outcome.PASS}
    for name, row in rows.items():
        said = f"the declared gradient of {declared.__name__} in Net is taken as it is, and not judged"
        assert row.message.endswith(said) is (name in UPSTREAM)


@pytest.mark.parametrize("declared", LINEAR, ids=lambda d: getattr(d, "__qualname__", "Bound"))
def test_undeclared_it_fails(declared: Any) -> None:
    assert failing(rows_of(declared, expect={})) >= {"first.weight", "first.bias"}


@pytest.mark.parametrize(("mistake", "found"), [("upstream", UPSTREAM[:2]), ("downstream", UPSTREAM)])
@pytest.mark.parametrize("declared", LINEAR, ids=lambda d: getattr(d, "__qualname__", "Bound"))
def test_a_wrong_function_beside_it_is_named(declared: Any, mistake: str, found: tuple[str, ...]) -> None:
    rows = by_name(rows_of(declared, mistake))
    assert {name for name, row in rows.items() if row.outcome is Outcome.FAIL} == set(found)
    for name in found:
        assert rows[name].cause == "wrong backward of Wrong in Net", rows[name].cause


@pytest.mark.parametrize("declared", LINEAR, ids=lambda d: getattr(d, "__qualname__", "Bound"))
def test_a_stop_gradient_beside_it_is_named(declared: Any) -> None:
    rows = by_name(rows_of(declared, "stopped"))
    assert {name for name, row in rows.items() if row.outcome is Outcome.FAIL} == {"first.weight", "first.bias"}
    assert rows["first.weight"].cause == "stop-gradient at Net"


@pytest.mark.parametrize("mistake", ["", "stopped"])
def test_what_is_upstream_of_one_that_is_not_linear_is_skipped(mistake: str) -> None:
    rows = by_name(rows_of(Clipped, mistake))
    assert {name for name, row in rows.items() if row.outcome is Outcome.SKIPPED} == set(UPSTREAM)
    assert rows["last.weight"].outcome is Outcome.PASS


class Spiking(nn.Module):
    """A recurrent net of leaky neurons: the same Function many times, its results in its own inputs."""

    def __init__(self, forgets: bool = False) -> None:
        super().__init__()
        self.into, self.around, self.out = nn.Linear(8, 10), nn.Linear(10, 10), nn.Linear(10, 3)
        self.forgets = forgets

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        potential = x.new_zeros(len(x), 10)
        spikes, total = torch.zeros_like(potential), 0
        for _ in range(4):
            kept = potential.detach() if self.forgets else potential
            potential = 0.8 * kept * (1 - spikes) + self.into(x) + 0.3 * self.around(spikes)
            spikes = Spike.apply(potential - 0.5)
            total = total + self.out(spikes)
        return total


@pytest.mark.parametrize("forgets", [False, True])
def test_a_spiking_net_is_judged_through_time(forgets: bool) -> None:
    batch = {"inputs": torch.randn(12, 8), "targets": torch.arange(12) % 3}
    rows = by_name(audit(Spiking(forgets), batch, expect={"custom_gradient": ["Spike"]}))
    wrong = {name for name, row in rows.items() if row.outcome is not Outcome.PASS}
    assert wrong == ({"into.weight", "into.bias", "around.weight", "around.bias"} if forgets else set())


class Encoder(nn.Module):
    """Spikes of the inputs, which ask for no gradient, before those of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(Spike.apply(self.first(Spike.apply(x))))


def test_a_call_that_no_gradient_passes_is_no_hindrance() -> None:
    batch = {"inputs": torch.randn(12, 8), "targets": torch.arange(12) % 3}
    rows = by_name(audit(Encoder(), batch, expect={"custom_gradient": ["Spike"]}))
    assert {row.outcome for row in rows.values()} == {Outcome.PASS}
