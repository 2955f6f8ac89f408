"""The audited optimizer is the live one: attributes, hooks and a step of its own come along, and it stays untouched."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.optimizer import register_optimizer_step_post_hook

import audits
from audits import AuditReport, Outcome, Recipe, RecipeError
from audits.recipe.moulds import own_step
from tests.audits.updates import live_optimizers as live

Make = Callable[[nn.Module], torch.optim.Optimizer]

DTYPES = (torch.float32, torch.float64)


def judged(make: Make, *, dtype: torch.dtype = torch.float32, steps: int = 3, **fields: Any) -> AuditReport:
    """Train, capture, audit; model and optimizer must come out bit for bit as they went in."""
    model, batch = live.subject(dtype)
    optimizer = make(model)
    live.trained(model, batch, optimizer, steps)
    recipe = Recipe.capture(model, batch=batch, loss=live.classify, optimizer=optimizer, **fields)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict(), _attributes(optimizer)))
    held = [p for group in optimizer.param_groups for p in group["params"]]
    report = audits.audit(model, recipe, device="cpu")
    assert all(p is q for p, q in zip(held, model.parameters(), strict=True))
    after = (model.state_dict(), optimizer.state_dict(), _attributes(optimizer))
    assert _same(before, after)
    assert {r.outcome for r in report.rows if r.check == "registration.optimizer-whole"} == {Outcome.PASS}
    return report


def _attributes(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    plain = {k: v for k, v in vars(optimizer).items() if isinstance(v, (int, float, str, list))}
    buffers = list(getattr(optimizer, "buffers", {}).values())
    return {**{k: v for k, v in plain.items() if k != "param_groups"}, "buffers": buffers}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def hooked(cls: Any, *, pre: Any = None, post: Any = None, **options: Any) -> Make:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = cls(model.parameters(), **options)
        if pre is not None:
            optimizer.register_step_pre_hook(pre)
        if post is not None:
            optimizer.register_step_post_hook(post)
        return optimizer

    return make


def failing(report: AuditReport) -> dict[str, str]:
    return {r.check: r.message for r in report.rows if r.outcome is Outcome.FAIL}


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("make", "check", "hook"),
    [
        (hooked(SGD, post=live.clamps_weights, lr=0.1), "update.outside-step", "step post-hook"),
        (hooked(AdamW, pre=live.takes_signs, lr=0.01), "step.gradient", "step pre-hook"),
        (hooked(SGD, post=live.forgets, lr=0.01, momentum=0.9), "update.state", "step post-hook"),
    ],
    ids=["clamp", "sign", "state"],
)
def test_what_a_hook_writes_fails_by_its_name_until_it_is_declared(
    make: Make, check: str, hook: str, dtype: torch.dtype, steps: int
) -> None:
    wrong = judged(make, dtype=dtype, steps=steps)
    assert wrong.outcome is Outcome.FAIL
    assert f"the {hook} {live.__name__}." in failing(wrong)[check]
    assert "step_hooks" in failing(wrong)[check]
    meant = judged(make, dtype=dtype, steps=steps, expect={"step_hooks": [f"{live.__name__}.*"]})
    assert (failing(meant), meant.coverage) == ({}, 1.0)


@pytest.mark.parametrize("fields", [{}, {"step": live.own_step}], ids=["canonical", "own step"])
@pytest.mark.parametrize(
    "make",
    [
        hooked(AdamW, post=live.looks_on, lr=0.01),
        hooked(AdamW, post=lambda *_: None, lr=0.01),
        hooked(live.Slotted.plain, post=live.looks_on, lr=0.1),
    ],
    ids=["importable", "lambda", "twice a step"],
)
def test_a_hook_that_only_looks_on_is_no_alarm(make: Make, fields: Any) -> None:
    rule = "SGD" if isinstance(make(live.subject()[0]), SGD) else "AdamW"
    expect = {} if rule == "AdamW" else {"optimizer": rule}
    report = judged(make, expect=expect, **fields)
    assert (report.outcome, report.coverage) == (Outcome.PASS, 1.0), report.headline


def test_a_hook_that_clips_as_declared_is_the_declared_clipping() -> None:
    make = hooked(AdamW, pre=live.clips, lr=0.01)
    report = judged(make, step=live.own_step, clip_grad_norm=0.05)
    assert (report.outcome, report.coverage) == (Outcome.PASS, 1.0), report.headline
    unclipped = judged(hooked(AdamW, lr=0.01), step=live.own_step, clip_grad_norm=0.05)
    assert "step.clipping" in failing(unclipped)


def test_a_declared_hook_inside_a_step_inside_a_step_is_told_from_the_rule() -> None:
    make = hooked(live.Slotted.plain, post=live.clamps_weights, lr=0.1)
    meant = judged(make, expect={"optimizer": "SGD", "step_hooks": "clamps_weights"})
    assert (failing(meant), meant.coverage) == ({}, 1.0)
    assert "update.outside-step" in failing(judged(make, steps=0, expect={"optimizer": "SGD"}))


def test_a_declared_hook_that_is_not_there_is_an_error() -> None:
    model, batch = live.subject()
    with pytest.raises(RecipeError, match="no optimizer has a step hook of that name"):
        Recipe.capture(model, batch=batch, loss=live.classify, optimizer=SGD(model.parameters(), lr=0.1),
                       expect={"step_hooks": ["clamps"]})  # fmt: skip


def _wrapped(kind: str) -> Make:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = AdamW(model.parameters(), lr=1e-2)
        original = optimizer.step
        calls: list[int] = []

        def step(closure: Any = None) -> Any:
            if kind == "signs":
                live.takes_signs(optimizer, (), {})
            calls.append(1)
            found = original(closure)
            if kind == "clamps":
                live.clamps_weights(optimizer, (), {})
            return found

        def replaced(self: Any, closure: Any = None) -> None:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(parameter.grad, alpha=1e-2)  # type: ignore[arg-type]

        def passed(self: Any, closure: Any = None) -> Any:
            return type(self).step(self, closure)

        bound = {"replaced": replaced, "passed on": passed}.get(kind)
        optimizer.step = step if bound is None else types.MethodType(bound, optimizer)  # type: ignore[method-assign]
        return optimizer

    return make


@pytest.mark.parametrize(
    ("kind", "check"),
    [("clamps", "update.outside-step"), ("signs", "step.gradient"), ("replaced", "update.rule")],
)
def test_a_step_set_on_the_instance_is_judged_as_what_it_does(kind: str, check: str) -> None:
    report = judged(_wrapped(kind), steps=0)
    message = failing(report)[check]
    assert "set on the instance" in message
    assert "_wrapped.<locals>" in message


@pytest.mark.parametrize("kind", ["counts", "passed on"])
def test_a_step_set_on_the_instance_that_changes_nothing_passes(kind: str) -> None:
    report = judged(_wrapped(kind))
    assert (report.outcome, report.coverage) == (Outcome.PASS, 1.0), report.headline


def _set_later(coupled: bool) -> Make:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = live.Flagged(model.parameters(), coupled=not coupled)
        optimizer.coupled = coupled
        return optimizer

    return make


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("right", "wrong", "declared"),
    [
        (lambda m: live.Flagged(m.parameters(), coupled=False), lambda m: live.Flagged(m.parameters(), coupled=True),
         None),
        (_set_later(False), _set_later(True), None),
        (lambda m: live.Slotted(m.parameters(), 1.0, lr=0.1), lambda m: live.Slotted(m.parameters(), 0.5, lr=0.1),
         "SGD"),
    ],
    ids=["argument", "set later", "slot"],
)  # fmt: skip
def test_what_is_in_neither_defaults_nor_groups_comes_along(
    right: Make, wrong: Make, declared: str | None, dtype: torch.dtype, steps: int
) -> None:
    expect = {"optimizer": declared} if declared else {}
    report = judged(right, dtype=dtype, steps=steps, expect=expect)
    assert (report.outcome, report.coverage) == (Outcome.PASS, 1.0), report.headline
    assert "update.rule" in failing(judged(wrong, dtype=dtype, steps=steps, expect=expect))


@pytest.mark.parametrize("steps", [0, 3])
def test_state_beside_state_comes_along(steps: int) -> None:
    right = judged(lambda m: live.Private(m.parameters()), steps=steps, expect={"optimizer": "SGD"})
    assert (right.outcome, right.coverage) == (Outcome.PASS, 1.0), right.headline
    lost = judged(lambda m: live.Lost(m.parameters()), steps=steps, expect={"optimizer": "SGD"})
    assert set(failing(lost)) == {"registration.state-round-trip"}


@pytest.mark.parametrize("cls", [AdamW, SGD, live.Plain])
def test_a_live_scheduler_is_no_wrapped_step(cls: Any) -> None:
    made: list[Any] = []

    def make(model: nn.Module) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = cls(model.parameters(), lr=0.01)
        made.append(torch.optim.lr_scheduler.StepLR(optimizer, 5))
        return optimizer

    report = judged(make)
    assert (report.outcome, report.coverage) == (Outcome.PASS, 1.0), report.headline
    assert "set on the instance" not in " ".join(row.message for row in report.rows)


def test_hooks_that_count_are_not_called_for_the_users_own() -> None:
    calls: list[str] = []
    report = judged(hooked(SGD, pre=lambda *_: calls.append("pre"), lr=0.01), steps=2)
    assert report.outcome is Outcome.PASS
    assert calls == ["pre", "pre"]  # the two steps of training, none of the audit's


def test_torchs_own_optimizers_keep_their_recipe() -> None:
    model, batch = live.subject()
    for optimizer in (AdamW(model.parameters()), torch.optim.LBFGS(model.parameters())):
        torch.optim.lr_scheduler.StepLR(optimizer, 5)
        recipe = Recipe.capture(model, batch=batch, loss=live.classify, optimizer=optimizer)
        assert recipe.phases[0].optimizer.kept is None


@pytest.mark.parametrize("before", [False, True], ids=["after the scheduler", "before it"])
def test_a_step_that_torch_itself_wraps_is_still_the_class_s(before: bool) -> None:
    """`torch.compile` anywhere in a process wraps the steps of two of torch's classes."""
    model, batch = live.subject()
    optimizer = torch.optim.LBFGS(model.parameters())
    original = torch.optim.LBFGS.step

    def wrap() -> None:
        torch.optim.LBFGS.step = torch._dynamo.disable(original)  # type: ignore[method-assign]

    try:
        if before:
            wrap()
        torch.optim.lr_scheduler.StepLR(optimizer, 5)
        wrap()
        recipe = Recipe.capture(model, batch=batch, loss=live.classify, optimizer=optimizer)
    finally:
        torch.optim.LBFGS.step = original  # type: ignore[method-assign]
    assert recipe.phases[0].optimizer.kept is None


def test_a_step_that_the_user_wraps_is_his_whatever_it_looks_like() -> None:
    model, batch = live.subject()
    optimizer = SGD(model.parameters(), lr=0.1)
    theirs = optimizer.step

    @functools.wraps(theirs)
    def step(closure: Any = None) -> Any:
        return theirs(closure)

    optimizer.step = step  # type: ignore[method-assign]
    kept = Recipe.capture(model, batch=batch, loss=live.classify, optimizer=optimizer).phases[0].optimizer.kept
    assert kept is not None
    assert kept.mould is not None
    assert own_step(kept.mould) is not None


def test_a_hook_on_all_optimizers_is_a_hook_of_each() -> None:
    handle = register_optimizer_step_post_hook(live.clamps_weights)
    try:
        report = judged(hooked(SGD, lr=0.1), steps=0)
        meant = judged(hooked(SGD, lr=0.1), steps=0, expect={"step_hooks": "clamps_weights"})
    finally:
        handle.remove()
    assert "live_optimizers.clamps_weights" in failing(report)["update.outside-step"]
    assert (failing(meant), meant.coverage) == ({}, 1.0)


def test_a_step_put_into_torchs_class_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = live.subject()
    optimizer = SGD(model.parameters(), lr=0.1)
    original = SGD.step

    def step(self: Any, closure: Any = None) -> Any:
        found = original(self, closure)
        live.clamps_weights(self, (), {})
        return found

    monkeypatch.setattr(SGD, "step", step)
    recipe = Recipe.capture(model, batch=batch, loss=live.classify, optimizer=optimizer)
    kept = recipe.phases[0].optimizer.kept
    assert kept is not None
    assert "the step of its class" in kept.missing[0]
    message = failing(audits.audit(model, recipe, device="cpu"))["update.rule"]
    assert "the step of its class was replaced" in message
    assert "torch build" not in message
