"""Optimizers without a reference rule: each relation breaks for its wrong-on-purpose twin, and for nobody else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import audits
from audits.causes import Cause
from audits.live.subject import open_subject
from audits.outcomes import Outcome
from audits.recipe.recipe import Recipe
from audits.settings import AuditSettings
from audits.updates.relations import contract, descent, elements, numbers, options, verdict_of
from audits.updates.relations.relation import Held
from audits.updates.relations.verdict import Verdict
from tests.audits.updates.subjects import audited, failed, of
from tests.wrong_on_purpose.updates import foreign, models

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def judged(own: type[Any], mistake: str = "", dtype: torch.dtype = torch.float32, **chosen: Any) -> Verdict:
    model, batch = models.mlp()
    model, batch = model.to(dtype), {"x": batch["x"].to(dtype), "y": batch["y"]}
    optimizer = own(model.parameters(), mistake=mistake, **chosen)
    recipe = Recipe.capture(model, batch=batch, loss=models.classify, optimizer=optimizer)
    with open_subject(model, recipe, AuditSettings(), device="cpu") as subject:
        return verdict_of(subject, subject.phases[0])


CORRECT: list[tuple[type[Any], dict[str, Any]]] = [
    (foreign.Foreign, {}),
    (foreign.Foreign, {"weight_decay": 0.1, "nesterov": True, "lr": 0.1}),
    (foreign.Foreign, {"maximize": True, "beta": 0.0}),
    (foreign.ForeignForeach, {}),
    (foreign.ForeignForeach, {"foreach": True}),
    (foreign.Normed, {"weight_decay": 0.01}),
    (foreign.Clipped, {}),
    (foreign.Grouped, {}),
    (foreign.Centered, {}),
    (foreign.Averaging, {}),
    (foreign.Closured, {}),
    (foreign.Curved, {}),
    (foreign.Masked, {}),
]


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("own", "chosen"), CORRECT, ids=lambda v: v.__name__ if isinstance(v, type) else str(v))
def test_correct_ones_keep_every_relation(own: type[Any], chosen: dict[str, Any], dtype: torch.dtype) -> None:
    found = judged(own, dtype=dtype, **chosen)
    assert found.unable == ""
    assert [(r.claim, r.seen) for r in found.broken] == []
    assert found.outcome is Outcome.PASS
    assert sum(r.held is Held.YES for r in found.relations) >= 9


F = foreign.Foreign
WRONG: list[tuple[type[Any], str, dict[str, Any], str, bool]] = [
    (F, "unwritten memory", {}, contract.REPEATS, True),
    (F, "decays what has no gradient", {"lr": 0.1}, contract.UNTOUCHED, True),
    (F, "decays what is frozen", {}, contract.UNTOUCHED, True),
    (F, "goes on without gradient", {}, contract.UNTOUCHED, True),
    (F, "first group's options for all", {}, contract.GROUPS, True),
    (F, "default lr for all", {}, contract.GROUPS, True),
    (F, "default decay for all", {"weight_decay": 0.1}, contract.GROUPS, True),
    (foreign.Clipped, "first group's options for all", {}, contract.GROUPS, True),
    (F, "state by shape", {}, contract.ORDER, True),
    (F, "state by place", {"lr": 1e-2}, contract.ORDER, True),
    (F, "count outside the state", {}, contract.RESUMES, True),
    (F, "first row skipped", {}, elements.PIECES, False),
    (F, "last element skipped", {}, elements.PIECES, False),
    (F, "tail of a block skipped", {}, elements.PIECES, False),
    (F, "capacity of 4096", {}, elements.PIECES, False),
    (F, "no sign for vectors", {}, elements.PIECES, False),
    (F, "decay without lr", {}, options.STILL, False),
    (F, "nesterov ignored", {"nesterov": True}, options.USED, False),
    (F, "decay ignored", {"weight_decay": 0.1}, options.USED, False),
    (F, "maximize ignored", {}, options.MAXIMIZE, False),
    (F, "maximize ignored", {"maximize": True}, options.USED, True),
    (foreign.ForeignForeach, "foreach forgets momentum", {}, numbers.KERNELS, False),
    (F, "bfloat16 state", {}, numbers.STATE, False),
    (F, "bfloat16 numbers", {}, numbers.STATE, False),
    (F, "bfloat16 inside", {}, numbers.FLOAT32, False),
    (F, "ascends", {}, descent.FALLS, True),
    (foreign.Masked, "default lr for all", {}, contract.GROUPS, True),
]


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("own", "mistake", "chosen", "claim", "fails"), WRONG, ids=lambda v: str(getattr(v, "__name__", v))
)
def test_wrong_ones_break_the_relation_that_names_it(
    own: type[Any], mistake: str, chosen: dict[str, Any], claim: str, fails: bool, dtype: torch.dtype
) -> None:
    found = judged(own, mistake, dtype, **chosen)
    assert claim in [r.claim for r in found.broken]
    assert found.outcome is (Outcome.FAIL if fails else Outcome.WARN)
    assert f"BROKEN: {claim}" in found.message("own")
    assert judged(own, "", dtype, **chosen).broken == []


def test_a_version_judged_by_relations_passes_and_says_so() -> None:
    model, batch = models.mlp()
    recipe = Recipe.capture(model, batch=batch, loss=models.classify, optimizer=F(model.parameters()))
    report = audits.audit(model, recipe, device="cpu")
    assert report.outcome is Outcome.PASS
    assert report.coverage == 1.0
    assert "Judged by relations: Foreign has no reference rule" in report.headline
    assert {r.cause for r in report.rows if r.check == "update.rule"} == {Cause.RELATIONS}


def test_a_broken_contract_fails_the_version_and_the_row_names_it() -> None:
    model, batch = models.mlp()
    optimizer = F(model.parameters(), mistake="first group's options for all")
    rows = audited(model, batch=batch, loss=models.classify, optimizer=optimizer)
    assert failed(rows) == [("optimizer.invariants", None)]
    (found,) = of(rows, "optimizer.invariants")
    assert found.cause == contract.GROUPS
    assert "lr=0.0005 of the second group" in found.message


def test_relations_leave_the_random_generators_alone() -> None:
    model, batch = models.mlp()
    recipe = Recipe.capture(model, batch=batch, loss=models.classify, optimizer=F(model.parameters()))
    with open_subject(model, recipe, AuditSettings(), device="cpu") as subject:
        before = torch.get_rng_state()
        verdict_of(subject, subject.phases[0])
        assert torch.equal(before, torch.get_rng_state())


def test_relations_do_not_run_where_a_rule_is_known() -> None:
    model, batch = models.mlp()
    rows = audited(model, batch=batch, loss=models.classify, optimizer=torch.optim.AdamW(model.parameters()))
    assert of(rows, "optimizer.invariants") == []


def test_a_step_that_cannot_be_taken_is_one_sentence() -> None:
    class Asks(foreign.Foreign):
        def step(self, closure: Any = None, *, hessian: Any = None) -> Any:
            raise ValueError("needs hessian=")

    model, batch = models.mlp()
    optimizer = Asks(model.parameters())
    recipe = Recipe.capture(model, batch=batch, loss=models.classify, optimizer=optimizer)
    with open_subject(model, recipe, AuditSettings(), device="cpu") as subject:
        found = verdict_of(subject, subject.phases[0])
    assert found.outcome is Outcome.INCONCLUSIVE
    assert "needs hessian=" in found.message("Asks")


def test_shapes_of_the_model_are_tried() -> None:
    class Skips(foreign.Foreign):
        def special(self, update: torch.Tensor, p: torch.Tensor, lr: float) -> None:
            if tuple(p.shape) == (37, 11):
                update[30:].zero_()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(11, 37), nn.Tanh(), nn.Linear(37, 3))
    batch = {"x": torch.randn(8, 11), "y": torch.randint(0, 3, (8,))}
    recipe = Recipe.capture(model, batch=batch, loss=models.classify, optimizer=Skips(model.parameters()))
    with open_subject(model, recipe, AuditSettings(), device="cpu") as subject:
        found = verdict_of(subject, subject.phases[0])
    assert [(r.claim, "(37, 11)" in r.seen, "330 to 406" in r.seen) for r in found.broken] == [
        (elements.PIECES, True, True)
    ]


@pytest.mark.parametrize("own", [foreign.Closured, foreign.Curved, foreign.Averaging], ids=lambda c: c.__name__)
def test_steps_that_ask_for_more_are_taken(own: type[Any]) -> None:
    model, batch = models.mlp()
    rows = audited(model, batch=batch, loss=models.classify, optimizer=own(model.parameters()))
    assert failed(rows) == []
    assert {r.outcome for r in of(rows, "update.rule")} == {Outcome.PASS}


@pytest.mark.parametrize("shares", [False, True])
def test_a_flag_of_the_constructor_comes_along(shares: bool) -> None:
    model, batch = models.mlp()
    optimizer = foreign.Flagged(model.parameters(), shares=shares)
    rows = audited(model, batch=batch, loss=models.classify, optimizer=optimizer)
    assert failed(rows) == ([("optimizer.invariants", None)] if shares else [])


def test_what_is_counted_in_the_groups_begins_anew() -> None:
    model, batch = models.mlp()
    optimizer = foreign.Counting(model.parameters())
    models.train(model, batch, models.classify, optimizer)
    rows = audited(model, batch=batch, loss=models.classify, optimizer=optimizer)
    assert failed(rows) == []
    assert {r.outcome for r in of(rows, "update.rule")} == {Outcome.PASS}
