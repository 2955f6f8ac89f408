"""Two Parameters on one memory fail under registration; views side by side, ties and odd tensors do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from audits import Outcome, Recipe, audit
from audits.errors import RecipeError
from audits.recipe.callables import CallableReference
from audits.recipe.overlaps import Overlap, overlaps_of
from audits.recipe.plain_form import recipe_from_plain, recipe_to_plain


class Language(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8, dtype=dtype), nn.Linear(8, 11, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(x).mean(1))  # type: ignore[no-any-return]


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"])


BATCH = {"x": torch.arange(24).reshape(8, 3) % 11, "y": torch.arange(8)}


def captured(model: nn.Module, **options: Any) -> Recipe:
    trainable = [p for p in model.parameters() if p.requires_grad]
    return Recipe.capture(model, batch=BATCH, loss=loss, optimizer=torch.optim.Adam(trainable), **options)


def through_data(model: Language) -> None:
    model.head.weight.data = model.embed.weight.data


def through_a_view(model: Language) -> None:
    model.head.weight.data = model.embed.weight.data.view(8, 11).t().contiguous()
    model.head.weight.data[:, :3] = 0
    model.embed.weight.data = model.head.weight.data.view(-1)[:88].view(11, 8)


def through_a_part(model: Language) -> None:
    memory = torch.randn(100, dtype=model.embed.weight.dtype)
    model.embed.weight.data, model.head.weight.data = memory[:88].view(11, 8), memory[12:].view(11, 8)


def tied(model: Language) -> None:
    model.head.weight = model.embed.weight


def side_by_side(model: Language) -> None:
    memory = torch.randn(176, dtype=model.embed.weight.dtype)
    model.embed.weight.data, model.head.weight.data = memory[:88].view(11, 8), memory[88:].view(11, 8)


def interleaved(model: Language) -> None:
    memory = torch.randn(11, 16, dtype=model.embed.weight.dtype)
    model.embed.weight.data, model.head.weight.data = memory[:, :8], memory[:, 8:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("share", "common"), [(through_data, 88), (through_a_view, 88), (through_a_part, 76)])
def test_two_parameters_on_one_memory_fail(share: Callable[..., None], common: int, dtype: torch.dtype) -> None:
    model = Language(dtype)
    share(model)
    report = audit(model, captured(model), device="cpu")
    (row,) = [r for r in report.rows if r.outcome is Outcome.FAIL]
    assert (row.check, row.parameter, row.measured) == ("registration.tied", "embed.weight", common)
    assert "embed.weight and head.weight are two Parameters" in row.message
    assert "twice" in row.message
    cure = "model.head.weight = model.embed.weight" if common == 88 else "as a view of it"
    assert cure in row.message
    if share is through_data:
        assert model.head.weight.data_ptr() == model.embed.weight.data_ptr(), "given back on one memory"


@pytest.mark.parametrize("share", [tied, side_by_side, interleaved])
def test_ties_and_views_side_by_side_pass(share: Callable[..., None]) -> None:
    model = Language()
    share(model)
    report = audit(model, captured(model), device="cpu")
    assert not report.failed_checks
    assert overlaps_of(model) == ()


def test_flat_memory_of_many_weights_is_no_overlap() -> None:
    model = nn.LSTM(3, 5, num_layers=2)
    memory = torch.randn(sum(p.numel() for p in model.parameters()))
    place = 0
    for parameter in model.parameters():
        parameter.data = memory[place : place + parameter.numel()].view_as(parameter)
        place += parameter.numel()
    assert overlaps_of(model) == ()


def test_a_frozen_twin_warns_and_two_frozen_ones_pass() -> None:
    for frozen, outcome in ((("head",), Outcome.WARN), (("head", "embed"), Outcome.PASS)):
        model = Language()
        through_data(model)
        model.bias = nn.Parameter(torch.zeros(11))
        model.register_forward_hook(lambda module, inputs, output: output + module.bias)
        for name in frozen:
            model.get_submodule(name).requires_grad_(False)
        rows = audit(model, captured(model), device="cpu").rows
        assert [r.outcome for r in rows if r.check == "registration.tied" and r.parameter] == [outcome]


def test_tensors_without_memory_of_their_own_do_no_harm() -> None:
    model = nn.Module()
    model.empty = nn.Parameter(torch.zeros(0, 3))
    model.empty_too = nn.Parameter(model.empty.data)
    model.meta, model.meta_too = (nn.Parameter(torch.zeros(3, device="meta")) for _ in range(2))
    model.sparse = nn.Parameter(torch.eye(3).to_sparse())
    model.lazy = nn.LazyLinear(3)
    model.number = nn.Parameter(torch.zeros(()))
    model.expanded = nn.Parameter(model.number.data.expand(4))
    model.spectrum = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    model.parts = nn.Parameter(torch.view_as_real(model.spectrum.data)[:, 0])
    assert overlaps_of(model) == (Overlap("number", "expanded", 1), Overlap("spectrum", "parts", 2))


def test_it_travels_with_the_recipe_and_fails_where_the_weights_are_separate() -> None:
    model = Language()
    through_data(model)
    recipe = captured(model)
    assert recipe.overlaps == (Overlap("embed.weight", "head.weight", 88),)
    read = recipe_from_plain(stored(recipe), batch=BATCH, state={})
    assert read.overlaps == recipe.overlaps
    loaded = Language()
    loaded.load_state_dict(model.state_dict())
    assert audit(loaded, recipe, device="cpu").failed_checks == ["registration.tied"]


def test_recipes_of_healthy_models_are_written_as_before() -> None:
    model = Language()
    plain = stored(captured(model))
    assert not {"overlaps", "captured_in_eval"} & set(plain)
    with pytest.raises(RecipeError, match="lacks the key 'second'"):
        recipe_from_plain({**plain, "overlaps": [{"first": "a"}]}, batch=BATCH, state={})


def stored(recipe: Recipe) -> dict[str, Any]:
    """As it is written."""
    phase = dataclasses.replace(recipe.phases[0], loss=CallableReference("tests.audits.recipe.test_overlaps:loss"))
    return recipe_to_plain(dataclasses.replace(recipe, phases=(phase,)))
