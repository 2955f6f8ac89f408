"""An audit gives the model back bit for bit: on success, on failure, and whatever is raised at whichever stage."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from audits import AuditReport, AuditSettings, Outcome, Recipe, RecipeError, audit
from audits.recipe.callables import CallableReference, as_loss
from benchmarks.models import correct
from tests.audits.live.families import FAMILIES, batch
from tests.audits.live.photographs import differences, photograph

#: Fewer probes: what is left behind does not depend on how often it was probed.
SETTINGS = AuditSettings(probes=1)

#: Where in an audit something is raised, as a share of its evaluations of the loss.
MOMENTS = (0.0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0)

#: Models of each way to be harmed, for every moment.
AT_EVERY_MOMENT = ("TwoNames", "ScriptedTwice", "Refilled", "ObjectCache", "LazyRegistry")

CASES = [*FAMILIES, *correct.FAMILIES]


class Trip:
    """A loss that raises at its n-th evaluation, after the model's forward."""

    def __init__(self, loss: Any) -> None:
        self._loss = as_loss(CallableReference.of(loss, role="loss"))
        self.evaluations = 0
        self.at: int | None = None
        self.error: type[BaseException] = RuntimeError

    def __call__(self, model: nn.Module, inputs: Any) -> torch.Tensor:
        value = self._loss(model, inputs)
        self.evaluations += 1
        if self.evaluations == self.at:
            raise self.error("planted")
        return value


def built(name: str) -> tuple[nn.Module, Any, Trip, torch.optim.Optimizer]:
    torch.manual_seed(1)
    if name in FAMILIES:
        model, inputs, loss = FAMILIES[name](), batch(), Trip("cross_entropy")
    else:
        model, inputs, loss_ = correct.FAMILIES[name]()
        loss = Trip(loss_)
    trainable = [p for p in model.parameters() if p.requires_grad]
    dense = torch.optim.SGD(trainable, lr=1e-3, momentum=0.9)
    for parameter in trainable:  # gradients and optimizer state of the user's own
        if not parameter.is_complex():
            parameter.grad = torch.full_like(parameter, 0.5)
    dense.step()
    return model, inputs, loss, dense


def run(
    name: str, moment: float | None = None, error: type[BaseException] = RuntimeError
) -> tuple[AuditReport | BaseException, list[str], Trip]:
    """Audit, and return the report or what was raised, what is different afterwards, and the loss."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, inputs, loss, optimizer = built(name)
        if moment is not None:
            loss.at, loss.error = max(1, math.ceil(moment * _evaluations(name))), error
        recipe = Recipe.capture(model, batch=inputs, loss=loss, optimizer=optimizer)
        before = photograph(model, optimizer)
        result: AuditReport | BaseException
        try:
            result = audit(model, recipe, settings=SETTINGS, device="cpu")
        except (Exception, KeyboardInterrupt) as raised:
            result = raised
        left = differences(before, photograph(model, optimizer))
    return result, left, loss


_COUNTED: dict[str, int] = {}


def _evaluations(name: str) -> int:
    if name not in _COUNTED:
        _COUNTED[name] = run(name)[2].evaluations
    return _COUNTED[name]


@pytest.mark.parametrize("name", CASES)
def test_success_leaves_nothing_behind(name: str) -> None:
    report, left, loss = run(name)
    assert isinstance(report, AuditReport), report
    assert not left
    _COUNTED[name] = loss.evaluations


@pytest.mark.sampled("moment")
@pytest.mark.parametrize(("name", "moment"), list(zip(CASES, itertools.cycle(MOMENTS), strict=False)))
def test_an_interrupt_leaves_nothing_behind(name: str, moment: float) -> None:
    raised, left, _ = run(name, moment, KeyboardInterrupt)
    assert isinstance(raised, KeyboardInterrupt)
    assert not left


@pytest.mark.sampled("name,error", "moment")
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("name", AT_EVERY_MOMENT)
def test_an_exception_at_any_moment_leaves_nothing_behind(name: str, moment: float, error: type[BaseException]) -> None:
    result, left, _ = run(name, moment, error)
    assert not left
    if error is KeyboardInterrupt:
        assert isinstance(result, KeyboardInterrupt)
    elif moment == 0.0:
        assert isinstance(result, RecipeError)


STAGES = {
    "opening": "audits.live.subject.try_losses",
    "registration": "audits.updates.audit.registration_rows",
    "float64 lane": "audits.gradients.check.judge",
    "native oracle": "audits.gradients.native.native._judge_all",
    "input gradients": "audits.gradients.inputs.lifted_loss",
    "training steps": "audits.updates.audit.gradient_rows",
    "synthetic probe": "audits.updates.audit.synthetic_rows",
    "health": "audits.health.gradient_rows",
    "diagnosis": "audits.run.diagnosed",
}


@pytest.mark.sampled
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("stage", STAGES)
def test_an_exception_of_the_audit_itself_leaves_nothing_behind(
    stage: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = []

    def planted(*_: Any, **__: Any) -> Any:
        reached.append(stage)
        raise error("planted")

    monkeypatch.setattr(STAGES[stage], planted)
    for name in ("TwoNames", "Refilled"):
        result, left, _ = run(name)
        assert reached
        assert not left
        assert isinstance(result, KeyboardInterrupt) or error is ZeroDivisionError


@pytest.mark.slow
@pytest.mark.sampled(cases=9)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_forward_that_keeps_things_passes_and_its_wrong_twin_fails(name: str, dtype: torch.dtype) -> None:
    reports = []
    for wrong in (False, True):
        torch.manual_seed(1)
        model = FAMILIES[name](wrong).to(dtype)
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch().items()}
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        recipe = Recipe.capture(model, batch=inputs, loss="cross_entropy", optimizer=optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reports.append(audit(model, recipe, device="cpu"))
    right, broken = reports
    assert right.outcome is Outcome.PASS, right.headline
    assert not [r for r in right.rows if r.outcome is Outcome.INCONCLUSIVE]
    assert broken.outcome is Outcome.FAIL
    failing = {
        r.parameter for r in broken.rows if r.outcome is Outcome.FAIL and r.check == "gradient.finite-difference"
    }
    assert any(parameter and parameter.startswith("a.") for parameter in failing)
    assert not any(parameter and parameter.startswith("b.") for parameter in failing)


def test_a_wrong_model_is_given_back_too() -> None:
    model = FAMILIES["Refilled"](wrong=True)
    optimizer = torch.optim.Adam(model.parameters())
    recipe = Recipe.capture(model, batch=batch(), loss="cross_entropy", optimizer=optimizer)
    before = photograph(model, optimizer)
    assert audit(model, recipe, device="cpu").outcome is Outcome.FAIL
    assert not differences(before, photograph(model, optimizer))


def stepped(change: Callable[[nn.Module], None]) -> Callable[..., None]:
    def step(model: nn.Module, inputs: Any, context: Any) -> None:
        context.optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs["x"]), inputs["y"]).backward()
        context.optimizer.step()
        change(model)

    return step


def _replace_parameter(model: nn.Module) -> None:
    model.b.weight = nn.Parameter(model.b.weight.detach().clone())


def _drop_submodule(model: nn.Module) -> None:
    del model.features
    model.extra_head = nn.Linear(2, 2)


@pytest.mark.parametrize("change", [_replace_parameter, _drop_submodule])
def test_what_a_step_function_does_to_the_model_is_undone(change: Callable[[nn.Module], None]) -> None:
    model = FAMILIES["Features"]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = Recipe.capture(model, batch=batch(), loss="cross_entropy", optimizer=optimizer, step=stepped(change))
    before = photograph(model, optimizer)
    audit(model, recipe, device="cpu")
    assert not differences(before, photograph(model, optimizer))


def test_capture_leaves_a_learning_rate_kept_in_a_tensor_as_it_is() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.1))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    inputs = {"inputs": torch.randn(4, 3), "targets": torch.randn(4, 2)}
    before = photograph(model, optimizer)
    recipe = Recipe.capture(model, batch=inputs, loss="mse_loss", optimizer=optimizer, scheduler=scheduler)
    assert not differences(before, photograph(model, optimizer))
    schedule = recipe.phases[0].scheduler
    assert schedule is not None
    assert schedule.learning_rates[1] == pytest.approx((0.05,))
