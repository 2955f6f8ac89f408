"""Compiled code: said where it was not run, judged where it was asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._functorch.config
from torch import nn
from torch.nn import functional as F

import audits
from audits.outcomes import Outcome, ResultRow
from audits.recipe.compiled_parts import compiled_parts
from audits.recipe.plain_form import recipe_from_plain, recipe_to_plain
from audits.report import AuditReport
from tests.audits.gradients.cases import classes

#: The partitioner and the decompositions of the default backend without its code generation, which takes half a minute.
BACKEND = "aot_eager_decomp_partition"
LIMIT = "Compiled code was not audited"

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Wave(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(1.1 * x)


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.wave, self.drop, self.head = nn.Linear(8, 8), Wave(), nn.Dropout(dropout), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.sin(self.drop(self.wave(self.first(x)))))


def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


@torch.compile(backend=BACKEND)
def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@torch.compiler.disable
def never(x: torch.Tensor) -> torch.Tensor:
    return 3 * x


class Calling(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return double(super().forward(x))


class Decorated(Net):
    @torch.compile(backend=BACKEND)
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.wave(self.first(x)))


class Disabled(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return never(super().forward(x))


def whole(model: nn.Module, backend: Any = BACKEND) -> nn.Module:
    return torch.compile(model, backend=backend)  # type: ignore[return-value]


def in_place(model: nn.Module, backend: Any = BACKEND) -> nn.Module:
    model.compile(backend=backend)
    return model


def block(model: nn.Module, backend: Any = BACKEND) -> nn.Module:
    model.wave = torch.compile(model.wave, backend=backend)
    return model


def block_in_place(model: nn.Module, backend: Any = BACKEND) -> nn.Module:
    model.wave.compile(backend=backend)
    return model


def method(model: nn.Module, backend: Any = BACKEND) -> nn.Module:
    model.forward = torch.compile(model.forward, backend=backend)
    return model


WAYS: dict[str, tuple[Callable[[nn.Module], nn.Module], type[Net], str]] = {
    "whole": (whole, Net, "model"),
    "in place": (in_place, Net, "model"),
    "block": (block, Net, "module wave"),
    "block in place": (block_in_place, Net, "module wave"),
    "method": (method, Net, "method forward"),
    "decorated": (lambda m: m, Decorated, "method forward"),
    "calls": (lambda m: m, Calling, "function double"),
}


def audit(
    model: nn.Module, *, own_loss: Any = loss, captured: nn.Module | None = None, compiled: bool = False, seed: int = 0
) -> AuditReport:
    held = captured if captured is not None else model
    optimizer = torch.optim.SGD(held.parameters(), lr=0.1)
    torch.manual_seed(seed)
    recipe = audits.Recipe.capture(held, batch=classes(), loss=own_loss, optimizer=optimizer, seed=seed)
    return audits.audit(model, recipe, settings=audits.AuditSettings(compiled=compiled), device="cpu")


def judged(report: AuditReport) -> list[ResultRow]:
    return [row for row in report.rows if row.check == "gradient.compiled"]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_what_is_compiled_is_found_said_and_judged(way: str) -> None:
    torch.manual_seed(0)
    compile_, kind, name = WAYS[way]
    model = compile_(kind())
    assert compiled_parts(model, []) == (name,)
    report = audit(model)
    assert report.outcome is Outcome.PASS
    assert report.headline.startswith("PASS")
    assert LIMIT in report.headline
    assert [row.outcome for row in judged(report)] == [Outcome.SKIPPED]
    assert [left["check"] for left in report.not_checked if "compiled" in left["reason"]] == ["gradient.compiled"]
    run = audit(model, compiled=True)
    assert run.outcome is Outcome.PASS, run.headline
    assert LIMIT not in run.headline
    assert {row.outcome for row in judged(run)} == {Outcome.PASS}
    assert len(judged(run)) == 4
    assert all(row.error <= row.threshold for row in judged(run))


def test_a_compiled_loss_and_what_a_loss_closes_over() -> None:
    torch.manual_seed(0)
    compiled = torch.compile(loss, backend=BACKEND)
    assert LIMIT in audit(Net(), own_loss=compiled).headline
    model = Net()
    wrapped = whole(model)
    report = audit(model, own_loss=lambda _, batch: loss(wrapped, batch))
    assert LIMIT in report.headline
    assert "function wrapped" in report.headline


def test_nothing_is_said_where_nothing_is_compiled() -> None:
    torch.manual_seed(0)
    for model in (Net(), Disabled()):
        report = audit(model, compiled=True)
        assert report.outcome is Outcome.PASS
        assert report.limits == ()
        assert judged(report) == []


def test_the_recipe_carries_it() -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = audits.Recipe.capture(whole(model), batch=classes(), loss="cross_entropy", optimizer=optimizer)
    assert recipe.compiled == ("model",)
    plain = recipe_to_plain(recipe)
    again = recipe_from_plain(plain, batch=recipe.batch, state={})
    assert again.compiled == ("model",)
    assert LIMIT in audits.audit(model, again, device="cpu").headline
    bare = audits.Recipe.capture(model, batch=classes(), loss="cross_entropy", optimizer=optimizer)
    assert "compiled" not in recipe_to_plain(bare), "recipes of eager models are as they were"
    assert LIMIT in audits.audit(whole(model), bare, device="cpu").headline
    assert bare.on(whole(model)).compiled == ("model",)
    assert bare.on(model) is bare


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("compile_", [whole, in_place])
def test_dropout_that_the_backward_draws_anew(compile_: Any, dtype: torch.dtype) -> None:
    for budget, outcome in ((1.0, Outcome.PASS), (0.0, Outcome.FAIL)):
        torch._dynamo.reset()
        torch.manual_seed(0)
        with torch._functorch.config.patch(activation_memory_budget=budget):
            model = compile_(Net(0.5).to(dtype))
            report = audit(model, own_loss=in_dtype(dtype), compiled=True)
        assert report.outcome is outcome, report.headline
        assert not [row for row in report.rows if row.outcome is Outcome.FAIL and row.check != "gradient.compiled"]
        if outcome is Outcome.FAIL:
            assert {"first.weight", "first.bias"} <= set(report.failed_parameters)
            for row in judged(report):
                assert "draws anew" in row.message
                assert row.error > row.threshold


def in_dtype(dtype: torch.dtype) -> Any:
    return lambda m, b: F.cross_entropy(m(b["x"].to(m_dtype(m, dtype))), b["y"])


def m_dtype(model: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """The float64 lane lifts the parameters."""
    return next((p.dtype for p in model.parameters()), dtype)


def scaled(factor: float) -> Any:
    """A backend whose backward is off by a factor in its first gradient."""
    from torch._dynamo.backends.common import aot_autograd

    def backward(graph: Any, _: Any) -> Any:
        return lambda *values: [
            o * factor if isinstance(o, torch.Tensor) and o.dim() == 2 else o for o in graph(*values)
        ]

    return aot_autograd(fw_compiler=lambda graph, _: graph.forward, bw_compiler=backward)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_compiler_that_gets_the_backward_wrong(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for factor, outcome in ((1.0, Outcome.PASS), (1.001, Outcome.FAIL)):
        torch._dynamo.reset()
        report = audit(whole(Net().to(dtype), scaled(factor)), own_loss=in_dtype(dtype), compiled=True)
        assert report.outcome is outcome, report.headline
        if outcome is Outcome.FAIL:
            assert report.failed_checks == ["gradient.compiled"]
            assert "head.weight" in report.failed_parameters
            assert "first.bias" not in report.failed_parameters


def test_a_compiler_that_fails_is_no_verdict() -> None:
    def refusing(graph: Any, inputs: Any) -> Any:
        raise NotImplementedError("no code for this machine")

    torch.manual_seed(0)
    report = audit(whole(Net(), refusing), compiled=True)
    assert [row.outcome for row in judged(report)] == [Outcome.INCONCLUSIVE]
    assert "no code for this machine" in judged(report)[0].message
    assert LIMIT in report.headline


@pytest.mark.slow
def test_the_model_is_given_back_as_it_was() -> None:
    torch.manual_seed(0)
    model = Net(0.5)
    wrapped = whole(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recipe = audits.Recipe.capture(
        wrapped, batch=classes(), loss=loss, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)
    )
    state = torch.get_rng_state()
    audits.audit(wrapped, recipe, settings=audits.AuditSettings(compiled=True), device="cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert model._compiled_call_impl is None
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
