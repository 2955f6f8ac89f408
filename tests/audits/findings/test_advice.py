"""Every warning and open claim says what to do, or that nothing needs doing: in many audits, and for every check."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from audits import AuditReport, Outcome, Recipe, audit
from audits.checks import CHECKS
from audits.findings.advice import advice_for, says_what_to_do, with_advice, without_advice
from audits.outcomes import ResultRow
from audits.run import refused
from benchmarks.models.correct import FAMILIES, classes

TOLD = (Outcome.WARN, Outcome.INCONCLUSIVE)


def audited(model: nn.Module, batch: Any, loss: Any, optimizer: Any = None, **options: Any) -> AuditReport:
    held = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer(held) if optimizer else torch.optim.SGD(held, lr=0.01, momentum=0.9)
    recipe = Recipe.capture(model, batch=batch, loss=loss, optimizer=optimizer, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return audit(model, recipe, device="cpu")


def mlp(**last: Any) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3, **last))


def unrepeatable() -> AuditReport:
    numbers = iter(range(10**9))

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return F.cross_entropy(model(batch["x"]), batch["y"]) * (1 + 1e-3 * (next(numbers) % 7))

    return audited(mlp(), classes(), loss)


def raising() -> AuditReport:
    def step(model: nn.Module, batch: Any, context: Any) -> None:
        raise RuntimeError("no step")

    return audited(mlp(), classes(), "cross_entropy", step=step)


def branching() -> AuditReport:
    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        out = F.cross_entropy(model(batch["x"]), batch["y"])
        return out if int(float(out) * 1e9) % 2 else out.sin()

    return audited(mlp(), classes(), loss)


def dead() -> AuditReport:
    model = mlp()
    nn.init.constant_(model[0].bias, -50.0)
    return audited(model, classes(), "cross_entropy")


def saturated() -> AuditReport:
    model = nn.Sequential(nn.Linear(8, 12), nn.Sigmoid(), nn.Linear(12, 3))
    nn.init.constant_(model[0].weight, 90.0)
    return audited(model, classes(), "cross_entropy")


def exploding() -> AuditReport:
    return audited(mlp(), classes(), lambda m, b: 1e3 * m(b["x"]).square().sum())


def no_rate() -> AuditReport:
    return audited(mlp(), classes(), "cross_entropy", lambda held: torch.optim.SGD(held, lr=0.0))


def own_optimizer() -> AuditReport:
    class Drifting(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 0.1})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(group["lr"] * p.grad + torch.rand_like(p) * 1e-3)

    return audited(mlp(), classes(), "cross_entropy", Drifting)


def only_float32() -> AuditReport:
    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        out = model(batch["x"])
        if out.dtype is not torch.float32:
            raise TypeError("a kernel for one dtype")
        return F.cross_entropy(out, batch["y"])

    return audited(mlp(), classes(), loss)


def family(name: str) -> Callable[[], AuditReport]:
    def made() -> AuditReport:
        model, batch, loss = FAMILIES[name]()
        return audited(model, batch, loss)

    return made


AUDITS: dict[str, Callable[[], AuditReport]] = {
    **{f.__name__: f for f in (unrepeatable, raising, branching, dead, saturated, exploding, no_rate, own_optimizer,
                               only_float32)},
    **{name: family(name) for name in ("bfloat16_weights", "odd_parameters", "offset_1e9", "tiny_gradients",
                                       "converged_regression")},
    "refused": lambda: refused("it cannot be loaded"),
}  # fmt: skip

#: Those of which every row passes nowadays may, the others must have something to tell.
CALM = {"offset_1e9", "only_float32"}


@pytest.mark.slow
@pytest.mark.parametrize("name", AUDITS)
def test_every_row_that_warns_or_stays_open_says_what_to_do(name: str) -> None:
    torch.manual_seed(0)
    told = [r for r in AUDITS[name]().rows if r.outcome in TOLD]
    assert told or name in CALM
    silent = [(r.check, r.outcome, r.cause, r.message) for r in told if not says_what_to_do(r.message)]
    assert not silent
    assert all(r.message.count("To do: ") <= 1 for r in told)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("outcome", list(Outcome))
def test_there_is_advice_of_its_own_for_every_check(check: str, outcome: Outcome) -> None:
    row = ResultRow(check=check, outcome=outcome, message="Something was seen.")
    (advised,) = with_advice([row])
    if outcome in TOLD:
        assert advice_for(row)
        assert says_what_to_do(advised.message)
        assert advised.message.startswith("Something was seen. To do: ")
        assert without_advice(advised.message) == "Something was seen"
        assert with_advice([advised]) == [advised]
    else:
        assert advised == row
