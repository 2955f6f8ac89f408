"""Recipe -> files -> Recipe is the identity; broken and hostile files are refused with their cause."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from audits import AuditSettings, Outcome, Phase, Recipe, RecipeError, audit
from audits.recipe.digests import recipe_digest
from registry_models.recipes.recipe_files import BATCH_FILE, RECIPE_FILE, STATE_FILE, read_recipe, write_recipe
from tests.stores import BATCH, linear_recipe


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return (
            isinstance(right, torch.Tensor)
            and left.dtype == right.dtype
            and left.requires_grad == right.requires_grad
            and torch.equal(left, right)
        )
    if isinstance(left, dict):
        return isinstance(right, dict) and left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and left == right


def assert_round_trip(recipe: Recipe, folder: Path) -> None:
    again = read_recipe(write_recipe(recipe, folder))
    assert again == recipe
    assert same(again.batch, recipe.batch)
    for left, right in zip(again.phases, recipe.phases, strict=True):
        assert same(left.optimizer.state, right.optimizer.state)
    assert recipe_digest(again) == recipe_digest(recipe)


tensors = st.sampled_from(
    [
        torch.arange(6).reshape(2, 3),
        torch.ones(2, dtype=torch.bfloat16),
        torch.tensor(1.5),
        torch.zeros(0, 3),
        torch.ones(2, dtype=torch.bool),
        torch.ones(2, 2, dtype=torch.complex64),
        torch.ones(3, requires_grad=True),
        torch.arange(12.0).reshape(3, 4).t(),
        torch.ones(2, dtype=torch.float64),
    ]
)
leaves = tensors | st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=4) | st.floats(-1, 1)
batches = st.dictionaries(
    st.text("abc_. ", min_size=1, max_size=3),
    st.recursive(leaves, lambda inner: st.lists(inner, max_size=2) | st.tuples(inner, inner), max_leaves=5),
    max_size=4,
)


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=batches)
def test_any_batch_survives(batch: dict[str, Any], tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    recipe = Recipe.capture(model, batch=batch, loss="model", optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    assert_round_trip(recipe, tmp_path)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.8, 0.9), amsgrad=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.LBFGS(p),
        lambda p: torch.optim.ASGD(p),
        lambda p: torch.optim.Rprop(p, lr=0.01),
    ],
)
def test_optimizer_state_survives(make: Any, tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    optimizer = make(model.parameters())

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(BATCH["inputs"]), BATCH["targets"])
        loss.backward()
        return loss

    optimizer.step(closure)
    recipe = Recipe.capture(model, batch=BATCH, loss="mse_loss", optimizer=optimizer)
    assert recipe.phases[0].optimizer.state
    assert_round_trip(recipe, tmp_path)


def test_phases_schedules_modules_and_stale_tensors_survive(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 1)})
    first, second = torch.optim.Adam(model["a"].parameters()), torch.optim.SGD(model["b"].parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(second, 10)
    model["b"] = nn.Linear(2, 1)
    phases = [
        Phase("first", loss=nn.CrossEntropyLoss(label_smoothing=0.1), optimizer=first, clip_grad_norm=0.5),
        Phase("second", loss="mse_loss", optimizer=second, scheduler=scheduler, accumulate=2),
    ]
    recipe = Recipe.capture(model, batch=[BATCH, BATCH], phases=phases, expect={"frozen": ["b.*"]}, mode="eval")
    assert_round_trip(recipe, tmp_path)
    assert read_recipe(tmp_path / "audit").phases[0].loss.resolve().label_smoothing == 0.1


class Doubled(torch.autograd.Function):
    """The identity; its backward doubles the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return 2 * gradient


class Doubling(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(Doubled.apply(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mark_that_asks_for_a_batch_tensors_gradient_survives_and_decides(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    found, digests = {}, set()
    for marked in (False, True):
        for kind in (nn.Linear, Doubling):
            model = kind(4, 3).to(dtype)
            batch = {
                "inputs": torch.randn(6, 4, dtype=dtype, requires_grad=marked),
                "targets": torch.randn(6, 3, dtype=dtype),
                "nested": [(torch.ones(2, dtype=torch.complex64, requires_grad=marked),)],
            }
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            recipe = Recipe.capture(model, batch=batch, loss="mse_loss", optimizer=optimizer)
            again = read_recipe(write_recipe(recipe, tmp_path / f"{marked}-{kind.__name__}"))
            assert [again.batch["inputs"].requires_grad, again.batch["nested"][0][0].requires_grad] == [marked] * 2
            assert not again.batch["targets"].requires_grad
            report = audit(model, again, settings=AuditSettings(checks=("gradient.input",)), device="cpu")
            found[marked, kind] = {r.parameter: r.outcome for r in report.rows}["<batch inputs>"]
            plain = replace(again, batch={**again.batch, "inputs": again.batch["inputs"].detach()})
            digests.add((marked, recipe_digest(again) == recipe_digest(plain)))
    assert found == {
        (False, nn.Linear): Outcome.PASS, (False, Doubling): Outcome.WARN,
        (True, nn.Linear): Outcome.PASS, (True, Doubling): Outcome.FAIL,
    }  # fmt: skip
    assert digests == {(False, True), (True, False)}, "a mark counts in the digest, and nothing else changed"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_recipe(linear_recipe(nn.Linear(2, 1)), tmp_path)


def test_comments_are_allowed_and_no_pickle_is_written(folder: Path) -> None:
    path = folder / RECIPE_FILE
    path.write_text("# a person's remark\n" + path.read_text())
    read_recipe(folder)
    assert {file.suffix for file in folder.iterdir()} == {".yaml", ".safetensors"}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: &a [1]\nb: *a", "aliases"),
        ("!!python/object/apply:os.system ['true']", "not plain YAML"),
        ("- 1", "must be a mapping"),
        ("schema: 1\nphases: []", "lacks the key 'batch'"),
        ("{", "not plain YAML"),
        ("\x00", "not plain YAML"),
    ],
)
def test_yaml_that_is_no_recipe_is_refused(folder: Path, text: str, complaint: str) -> None:
    (folder / RECIPE_FILE).write_text(text)
    with pytest.raises(RecipeError, match=complaint):
        read_recipe(folder)


@pytest.mark.parametrize("file", [BATCH_FILE, RECIPE_FILE])
def test_a_missing_file_is_named(folder: Path, file: str) -> None:
    (folder / file).unlink()
    with pytest.raises(RecipeError, match=f"there is no {file}"):
        read_recipe(folder)


def test_a_truncated_batch_is_named(folder: Path) -> None:
    path = folder / BATCH_FILE
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(RecipeError, match="truncated or corrupt"):
        read_recipe(folder)


def test_no_state_no_file(folder: Path) -> None:
    assert not (folder / STATE_FILE).exists()


def test_a_script_s_own_function_is_refused_with_the_cure(tmp_path: Path) -> None:
    from audits.recipe.callables import CallableReference

    model = nn.Linear(2, 1)
    recipe = Recipe.capture(
        model,
        batch=BATCH,
        loss=CallableReference("__main__:loss"),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    )
    with pytest.raises(RecipeError, match="move it to a module"):
        write_recipe(recipe, tmp_path)
