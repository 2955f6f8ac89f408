"""Which rule an optimizer is judged by, in which order, and how the rows say it; a reference rule of one's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from audits.errors import RecipeError
from audits.outcomes import Outcome, ResultRow
from audits.recipe.plain_form import recipe_from_plain, recipe_to_plain
from audits.recipe.recipe import Recipe
from audits.settings import AuditSettings
from tests.audits.updates.subjects import audited, failed, of
from tests.wrong_on_purpose.updates.faults_subclasses import MyAdamW
from tests.wrong_on_purpose.updates.optimizers import Own


class Halved(torch.optim.SGD):
    """What is meant to be SGD at half its rate: a rule of its own."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(0.5 * group["lr"] * p.grad)


class Inherits(torch.optim.AdamW):
    """Has AdamW's own step."""


class Nowhere(Own):
    """A rule that nobody published: a mean of the gradient and its own sign, averaged."""

    defaults_of = {"lr": 1e-2, "beta": 0.5}

    def move(self, p: torch.Tensor, g: torch.Tensor, state: dict[str, Any], group: dict[str, Any], index: int) -> None:
        m = state["m"] = group["beta"] * state.get("m", torch.zeros_like(p)) + (1 - group["beta"]) * g
        p.sub_(group["lr"] * (m + (0.2 if group["mistake"] else 0.1) * g))


def halved(theta: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], options: dict[str, Any]) -> torch.Tensor:
    return -0.5 * options["lr"] * gradient


def nowhere(
    theta: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], options: dict[str, Any]
) -> torch.Tensor:
    state.setdefault("m", torch.zeros_like(theta))
    state["m"].mul_(options["beta"]).add_((1 - options["beta"]) * gradient)  # writing in place is allowed
    return -options["lr"] * (state["m"] + 0.1 * gradient)


def shapeless(theta: torch.Tensor, gradient: torch.Tensor, state: Any, options: Any) -> torch.Tensor:
    return gradient.sum()


def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.mse_loss(model(batch["x"]).float(), batch["y"])


def subject(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return nn.Linear(6, 4).to(dtype), {"x": torch.randn(9, 6, dtype=dtype), "y": torch.randn(9, 4)}


def rows_of(
    cls: Any, dtype: torch.dtype = torch.float32, steps: int = 0, expect: Any = None, **options: Any
) -> list[ResultRow]:
    model, batch = subject(dtype)
    optimizer = cls(model.parameters(), **options)
    for _ in range(steps):
        loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return audited(model, batch=batch, loss=loss, optimizer=optimizer, expect=expect or {})


def judged(rows: list[ResultRow]) -> tuple[set[Outcome], str]:
    found = of(rows, "update.rule")
    return {r.outcome for r in found}, " ".join(r.message for r in found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steps", [0, 3])
def test_subclass_with_a_step_of_its_own_is_judged_as_its_ancestor(dtype: torch.dtype, steps: int) -> None:
    outcomes, text = judged(rows := rows_of(MyAdamW, dtype, steps, weight_decay=1e-2))
    assert outcomes == {Outcome.PASS}, text
    assert "moved as AdamW's rule (the nearest torch ancestor of MyAdamW) says" in text
    assert {r.outcome for r in of(rows, "update.state")} == {Outcome.PASS}  # its "m", "v" and "t" are found
    assert not [r.message for r in rows if r.outcome is Outcome.FAIL]


def test_small_decay_of_a_correct_subclass_is_resolved() -> None:
    outcomes, text = judged(rows_of(MyAdamW, weight_decay=1e-5))
    assert outcomes == {Outcome.PASS}, text


def test_inherited_step_is_torchs_own() -> None:
    outcomes, text = judged(rows_of(Inherits))
    assert outcomes == {Outcome.PASS}
    assert "AdamW's rule (whose step Inherits inherits)" in text


def test_torchs_own_class_needs_no_words() -> None:
    assert "(the" not in judged(rows_of(torch.optim.AdamW))[1]


def test_disagreement_says_how_much_and_how_to_declare_what_is_meant() -> None:
    outcomes, text = judged(rows_of(Halved, lr=0.1))
    assert outcomes == {Outcome.FAIL}
    assert "it is 0.5 times the rule's" in text
    assert "expect={'optimizer_rule': 'package.module:update'}" in text


@pytest.mark.parametrize("rule", [halved, f"{__name__}:halved", {"step": halved}], ids=["function", "path", "phase"])
def test_rule_of_ones_own_comes_first(rule: Any) -> None:
    outcomes, text = judged(rows := rows_of(Halved, lr=0.1, expect={"optimizer_rule": rule}))
    assert outcomes == {Outcome.PASS}, text
    assert "expect['optimizer_rule']" in text
    assert "halved" in text
    assert {r.outcome for r in of(rows, "optimizer.probe")} == {Outcome.PASS}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steps", [0, 3])
def test_rule_of_ones_own_with_state(dtype: torch.dtype, steps: int) -> None:
    expect = {"optimizer_rule": nowhere}
    right = rows_of(Nowhere, dtype, steps, expect)
    assert judged(right)[0] == {Outcome.PASS}, judged(right)[1]
    wrong = rows_of(Nowhere, dtype, steps, expect, mistake="wrong")
    assert Outcome.FAIL in judged(wrong)[0]
    assert "declare it" not in judged(wrong)[1]


def test_own_rule_is_stored_by_its_path() -> None:
    model, batch = subject()
    optimizer = Halved(model.parameters(), lr=0.1)
    recipe = Recipe.capture(model, batch=batch, loss=loss, optimizer=optimizer, expect={"optimizer_rule": halved})
    plain = recipe_to_plain(recipe)
    assert plain["expect"] == {"optimizer_rule": f"{__name__}:halved"}
    again = recipe_from_plain(plain, batch=batch, state={})
    assert [r.resolve() for r in again.optimizer_rules] == [halved]
    recipe = Recipe.capture(
        model, batch=batch, loss=loss, optimizer=optimizer, expect={"optimizer_rule": lambda *_: None}
    )
    with pytest.raises(RecipeError, match="cannot be stored"):
        recipe_to_plain(recipe)


def test_own_rule_that_gives_no_update_says_so() -> None:
    with pytest.raises(RecipeError, match=r"shapeless.*gives no update for a matrix.*update's shape is \(\)"):
        rows_of(Halved, lr=0.1, expect={"optimizer_rule": shapeless})
    with pytest.raises(RecipeError, match="nothing_there"):
        rows_of(Halved, lr=0.1, expect={"optimizer_rule": f"{__name__}:nothing_there"})


def test_unknown_class_has_no_rule() -> None:
    model, batch = subject()
    rows = audited(model, AuditSettings(), batch=batch, loss=loss, optimizer=Nowhere(model.parameters()))
    assert not [r for r in of(rows, "update.rule") if "'s rule" in r.message]


class HardCoded(torch.optim.Optimizer):
    """Adam's rule, its betas in the code: right, or without the second moment's correction."""

    def __init__(self, parameters: Any, lr: float = 1e-3, right: bool = True) -> None:
        super().__init__(parameters, {"lr": lr})
        self.right = right

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            if not state:
                state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            state["step"] += 1
            state["exp_avg"].lerp_(p.grad, 0.1)
            state["exp_avg_sq"].mul_(0.999).addcmul_(p.grad, p.grad, value=0.001)
            correction = 1 - 0.999 ** state["step"] if self.right else 1.0
            denominator = (state["exp_avg_sq"] / correction).sqrt() + 1e-8
            p.addcdiv_(state["exp_avg"] / (1 - 0.9 ** state["step"]), denominator, value=-self.param_groups[0]["lr"])


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize(
    ("declared", "why"),
    [("Adam", "its options lack 'betas', which the rule reads"), ("Foo", "no rule of that name is known")],
)
def test_a_declared_rule_that_nothing_is_held_to_is_said(declared: str, why: str, right: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    batch = {"inputs": torch.randn(8, 6), "targets": torch.arange(8) % 3}
    optimizer = HardCoded(model.parameters(), right=right)
    rows = audited(model, batch=batch, loss="cross_entropy", optimizer=optimizer, expect={"optimizer": declared})
    [said] = of(rows, "registration.hyperparameters")
    assert said.outcome is Outcome.INCONCLUSIVE
    assert (
        f"expect declares that HardCoded follows {declared}'s rule, and it cannot be held to that: {why}"
        in said.message
    )


@pytest.mark.parametrize("right", [True, False])
def test_the_rule_is_held_to_once_its_options_are_there(right: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    batch = {"inputs": torch.randn(8, 6), "targets": torch.arange(8) % 3}
    optimizer = HardCoded(model.parameters(), right=right)
    optimizer.defaults.update(betas=(0.9, 0.999), eps=1e-8)
    optimizer.param_groups[0].update(optimizer.defaults)
    rows = audited(model, batch=batch, loss="cross_entropy", optimizer=optimizer, expect={"optimizer": "Adam"})
    assert [row.outcome for row in of(rows, "registration.hyperparameters")] == [Outcome.PASS]
    assert bool(failed(rows)) is not right
    assert right or {check for check, _ in failed(rows)} <= {"update.rule", "optimizer.probe", "update.state"}
