"""Capture records what the optimizer really holds; a recipe survives its plain form."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from audits import Phase, Recipe, RecipeError
from audits.recipe.digests import recipe_digest
from audits.recipe.phases import UnknownTensor
from audits.recipe.plain_form import recipe_from_plain, recipe_to_plain

BATCH = {"inputs": torch.ones(4, 3), "targets": torch.ones(4, 2)}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.body = nn.Linear(3, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embedding(tokens)))  # type: ignore[no-any-return]


def capture(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> Recipe:
    return Recipe.capture(model, batch=BATCH, loss="mse_loss", optimizer=optimizer, **options)


def test_groups_are_recorded_by_name_and_identity() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    groups = [{"params": [model[0].weight], "weight_decay": 0.1}, {"params": [model[1].weight, model[1].bias]}]
    recipe = capture(model, torch.optim.AdamW(groups, lr=0.01, weight_decay=0.0))
    optimizer = recipe.phases[0].optimizer
    assert [group.parameters for group in optimizer.groups] == [("0.weight",), ("1.weight", "1.bias")]
    assert [group.options["weight_decay"] for group in optimizer.groups] == [0.1, 0.0]
    assert optimizer.class_path == "torch.optim.AdamW"


def test_a_tensor_the_model_lost_is_recorded_as_stale_with_its_likely_name() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model[1] = nn.Linear(3, 2)
    found = capture(model, optimizer).phases[0].optimizer
    assert found.names == ("0.weight", "0.bias")
    assert found.unknown == (
        UnknownTensor(2, (2, 3), "torch.float32", "1.weight"),
        UnknownTensor(3, (2,), "torch.float32", "1.bias"),
    )


def test_ties_frozen_flags_and_modes_are_recorded() -> None:
    model = Tied()
    model.body.requires_grad_(False)
    model.body.eval()
    batch = {"inputs": torch.tensor([[1, 2]]), "targets": torch.zeros(1, 2, 5)}
    recipe = Recipe.capture(model, batch=batch, loss="mse_loss", optimizer=torch.optim.SGD([model.head.weight], lr=0.1))
    assert recipe.ties == (("embedding.weight", "head.weight"),)
    assert {p.name: p.trainable for p in recipe.parameters}["body.weight"] is False
    assert recipe.module_modes == {"body": False}
    assert recipe.phases[0].optimizer.names == ("embedding.weight",)


def test_state_is_kept_by_name() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    nn.functional.mse_loss(model(BATCH["inputs"]), BATCH["targets"]).backward()
    optimizer.step()
    state = capture(model, optimizer).phases[0].optimizer.state
    assert torch.equal(state["weight"]["exp_avg"], optimizer.state[model.weight]["exp_avg"])
    optimizer.step()
    assert float(state["weight"]["step"]) == 1.0, "the recipe's state is a copy"


def test_a_schedule_is_simulated_without_touching_the_live_one() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    before = copy.deepcopy(scheduler.state_dict())
    schedule = capture(model, optimizer, scheduler=scheduler).phases[0].scheduler
    assert schedule is not None
    assert [rates[0] for rates in schedule.learning_rates[:5]] == [1.0, 1.0, 0.5, 0.5, 0.25]
    assert scheduler.state_dict() == before
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_wrappers_are_looked_through() -> None:
    model = nn.Linear(3, 2)
    recipe = capture(nn.DataParallel(model), torch.optim.SGD(model.parameters(), lr=0.1))
    assert recipe.phases[0].optimizer.names == ("weight", "bias")


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_plain_form_and_back_is_the_identity(optimizer: type[torch.optim.Optimizer]) -> None:
    model = nn.Linear(3, 2)
    recipe = capture(
        model,
        optimizer(model.parameters(), lr=0.1),
        clip_grad_norm=1.0,
        accumulate=2,
        seed=7,
        expect={"frozen": ["bias"]},
        stop_gradient=["loss"],
    )
    assert recipe_from_plain(recipe_to_plain(recipe), batch=recipe.batch, state={}) == recipe


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"loss_fn": 1}, "unknown key 'loss_fn'"),
        ({"precison": "native"}, "did you mean 'precision'"),
        ({"schema": 99}, "schema is 99"),
        ({"phases": []}, "at least one phase"),
        ({"precision": "bf16"}, "must be one of native, bf16-autocast, fp16-autocast, not 'bf16'"),
    ],
)
def test_a_wrong_key_is_named_with_its_cure(change: dict[str, Any], text: str) -> None:
    model = nn.Linear(3, 2)
    plain = recipe_to_plain(capture(model, torch.optim.SGD(model.parameters(), lr=0.1)))
    with pytest.raises(RecipeError, match=text):
        recipe_from_plain({**plain, **change}, batch=BATCH, state={})


def test_a_missing_key_is_named_with_its_place() -> None:
    model = nn.Linear(3, 2)
    plain = recipe_to_plain(capture(model, torch.optim.SGD(model.parameters(), lr=0.1)))
    del plain["phases"][0]["optimizer"]["class"]
    with pytest.raises(RecipeError, match=r"recipe\.phases\[0\]\.optimizer lacks the key 'class'"):
        recipe_from_plain(plain, batch=BATCH, state={})


def test_a_lambda_works_in_process_and_says_why_it_cannot_be_stored() -> None:
    model = nn.Linear(3, 2)
    recipe = Recipe.capture(
        model,
        batch=BATCH,
        loss=lambda m, b: m(b["inputs"]).sum(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    )
    with pytest.raises(RecipeError, match="move it to a module"):
        recipe_to_plain(recipe)


def test_capture_needs_a_loss_and_an_optimizer_or_phases() -> None:
    with pytest.raises(RecipeError, match="loss= and optimizer="):
        Recipe.capture(nn.Linear(3, 2), batch=BATCH)


def test_phases_carry_their_own_fields() -> None:
    model = nn.Linear(3, 2)
    phase = Phase("a", loss="mse_loss", optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(RecipeError, match="to each Phase"):
        Recipe.capture(model, batch=BATCH, phases=[phase], clip_grad_norm=1.0)
    with pytest.raises(RecipeError, match="phase names must differ"):
        Recipe.capture(model, batch=BATCH, phases=[phase, phase])


def test_the_digest_sees_everything() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    base = capture(model, optimizer)
    other_batch = {**BATCH, "inputs": torch.zeros(4, 3)}
    changed = [
        capture(model, optimizer, seed=1),
        capture(model, torch.optim.SGD(model.parameters(), lr=0.2)),
        Recipe.capture(model, batch=other_batch, loss="mse_loss", optimizer=optimizer),
    ]
    digests = {recipe_digest(recipe) for recipe in [base, *changed]}
    assert len(digests) == 4
    assert recipe_digest(capture(model, optimizer)) == recipe_digest(base)


def test_the_digest_sees_sparse_state() -> None:
    """SGD's momentum of a sparse gradient is sparse."""
    digests = []
    for steps in (1, 2, 2):
        torch.manual_seed(0)
        words = nn.Embedding(9, 2, sparse=True)
        batch = {"x": torch.tensor([[1, 2], [3, 3]])}
        optimizer = torch.optim.SGD(words.parameters(), lr=0.1, momentum=0.9)
        for _ in range(steps):
            optimizer.zero_grad()
            words(batch["x"]).square().sum().backward()
            optimizer.step()
        recipe = Recipe.capture(words, batch=batch, loss=lambda m, b: m(b["x"]).square().sum(), optimizer=optimizer)
        digests.append(recipe_digest(recipe))
    assert digests[1] == digests[2]
    assert digests[0] != digests[1]
