"""One cause, one finding: wrong models of each kind of root cause, and findings that only look alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from audits import AuditReport, Outcome, Recipe, ResultRow, audit
from audits.causes import Cause
from audits.findings.root_causes import in_one_line, root_findings

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


class HalfBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return torch.sin(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return 0.5 * grad * torch.cos(x)


class Sine(nn.Module):
    def __init__(self, right: bool) -> None:
        super().__init__()
        self.right = right

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x) if self.right else HalfBackward.apply(x)


class Detached(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x.detach()


def net(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    middle = Detached() if kind == "detach" else Sine(kind != "function")
    layers = [nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), middle, nn.Linear(6, 6), Sine(kind != "function")]
    return nn.Sequential(*layers, nn.Linear(6, 3))


def judged(kind: str, dtype: torch.dtype, **more: Any) -> AuditReport:
    model = net(kind).to(dtype)
    if kind == "hook":
        model[4].register_full_backward_hook(lambda module, grads, out: tuple((g and None) or 2 * g for g in grads[:0])
                                             or tuple(2 * g for g in grads))  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    if kind == "replaced":
        model[6] = nn.Linear(6, 3, dtype=dtype)
    batch = {"x": torch.randn(8, 5, dtype=dtype), "y": torch.randint(0, 3, (8,))}

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(model(batch["x"]), batch["y"])

    recipe = Recipe.capture(model, batch=batch, loss=loss, optimizer=optimizer, **more)
    return audit(model, recipe, device="cpu")


@DTYPES
def test_right_models_have_no_finding(dtype: torch.dtype) -> None:
    report = judged("right", dtype)
    assert report.root_findings == []
    assert report.causes == []


@DTYPES
def test_one_wrong_function_is_one_finding_whatever_lies_upstream(dtype: torch.dtype) -> None:
    report = judged("function", dtype)
    failing = [finding for finding in report.root_findings if finding.outcome is Outcome.FAIL]
    (one,) = failing
    assert one.cause == "HalfBackward's backward is wrong"
    assert set(one.parameters) == {f"{layer}.{name}" for layer in (0, 2, 4) for name in ("weight", "bias")}
    assert one.text == "HalfBackward's backward is wrong: 6 parameters, from 0.weight"
    assert report.headline.startswith(f"FAIL: {one.text} (gradient.finite-difference, gradient.input); ")
    assert "6.weight" not in report.headline, "what is innocent is not named"


@DTYPES
def test_a_stop_gradient_is_one_finding(dtype: torch.dtype) -> None:
    failing = [finding for finding in judged("detach", dtype).root_findings if finding.outcome is Outcome.FAIL]
    (one,) = failing
    assert one.cause.startswith("a stop-gradient in Detached (3)")
    assert len(one.parameters) == 4


@DTYPES
def test_a_backward_hook_is_named(dtype: torch.dtype) -> None:
    failing = [finding for finding in judged("hook", dtype).root_findings if finding.outcome is Outcome.FAIL]
    assert {finding.cause for finding in failing} == {"a backward hook on Linear (4) changes the gradient"}
    assert len(failing) == 1
    assert len(failing[0].parameters) == 4


@DTYPES
def test_a_replaced_module_is_one_finding_of_two_checks(dtype: torch.dtype) -> None:
    failing = [finding for finding in judged("replaced", dtype).root_findings if finding.outcome is Outcome.FAIL]
    (one,) = failing
    assert one.cause == "an optimizer holds tensors that are not the model's"
    assert one.checks == ("registration.stale", "registration.coverage")
    assert one.parameters == ("6.weight", "6.bias")


class HalfDecay(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        for group in self.param_groups:
            group["weight_decay"] *= 0.5
        found = super().step(closure)
        for group in self.param_groups:
            group["weight_decay"] *= 2
        return found


def test_a_wrong_option_is_one_finding_of_update_and_probe() -> None:
    model = net("right")
    optimizer = HalfDecay(model.parameters(), lr=0.05, weight_decay=0.1)
    batch = {"x": torch.randn(8, 5), "y": torch.randint(0, 3, (8,))}

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(model(batch["x"]), batch["y"])

    recipe = Recipe.capture(model, batch=batch, loss=loss, optimizer=optimizer, expect={"optimizer": "SGD"})
    report = audit(model, recipe, device="cpu")
    failing = [finding for finding in report.root_findings if finding.outcome is Outcome.FAIL]
    (one,) = [finding for finding in failing if "update.rule" in finding.checks]
    assert one.cause == "the update does not follow its rule: it is explained by weight decay applied 0.5 times"
    assert len(one.parameters) == 8
    assert [finding for finding in failing if finding is not one and finding.checks[0].startswith("optimizer")] == []


def row(check: str, cause: str | None, parameter: str | None, **more: Any) -> ResultRow:
    return ResultRow(check=check, outcome=more.pop("outcome", Outcome.FAIL), cause=cause, parameter=parameter, **more)


def test_other_causes_phases_and_waivers_stay_apart() -> None:
    rows = [
        row("gradient.finite-difference", Cause.WRONG_BACKWARD.at("F in A (a)"), "a.w"),
        row("gradient.finite-difference", Cause.WRONG_BACKWARD.at("F in B (b)"), "b.w"),
        row("gradient.finite-difference", Cause.WRONG_BACKWARD.at("G in B (b)"), "c.w"),
        row("gradient.input", Cause.WRONG_BACKWARD.at("F in A (a)"), "<batch x>"),
        row("update.rule", "it is 2 times the rule's (as with lr times 2)", "a.w", phase="d"),
        row("update.rule", "it is 2.0000001 times the rule's (as with lr times 2.0000001)", "b.w", phase="d"),
        row("update.rule", "it is 2 times the rule's (as with lr times 2)", "c.w", phase="g"),
        row("update.rule", "it is 2 times the rule's (as with lr times 2)", "d.w", phase="g", waiver="known"),
        row("update.state", None, "a.w", phase="d"),
        row("health.all-zero", None, "z", outcome=Outcome.WARN),
        row("update.frozen", None, "y", outcome=Outcome.PASS),
    ]
    found = root_findings(rows)
    assert [(one.cause.partition(":")[0], one.parameters) for one in found] == [
        ("F's backward is wrong", ("a.w", "b.w")),
        ("G's backward is wrong", ("c.w",)),
        ("the update does not follow its rule", ("a.w", "b.w")),
        ("the update does not follow its rule", ("c.w",)),
        ("the update does not follow its rule", ("d.w",)),
        ("a gradient is all zero", ("z",)),
    ]
    assert found[2].checks == ("update.rule", "update.state")
    assert [one.outcome for one in found[-2:]] == [Outcome.WARN, Outcome.WARN]
    assert sum(len(one.rows) for one in found) == len(rows) - 1, "every finding is in_one_line once"
    assert in_one_line(found, 2).endswith("; and 4 more findings")
