"""A compiled model through the registry: the version's report says that only eager code was run."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pytest
import torch
from mlflow.tracking import MlflowClient
from torch import nn

from audits import Outcome, Recipe
from audits.recipe.recipe import Recipe as RecipeType
from registry_models import log_model
from tests.registry_models.auditing import audited
from tests.stores import BATCH


def captured(model: nn.Module, bare: nn.Module) -> RecipeType:
    return Recipe.capture(
        model, batch=BATCH, loss="mse_loss", optimizer=torch.optim.SGD(bare.parameters(), lr=0.01)
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("where", ["nowhere", "model", "recipe", "in place"])
def test_a_compiled_version_says_so(client: MlflowClient, tmp_path: Path, where: str) -> None:
    mlflow.set_experiment("models")
    bare = nn.Linear(2, 1)
    with torch.no_grad():
        bare.weight.copy_(torch.tensor([[1.05, 1.0]]))
        bare.bias.fill_(0.1)
    compiled = torch.compile(bare) if where in ("model", "recipe") else bare
    if where == "in place":
        bare.compile()
    recipe = captured(compiled if where == "recipe" else bare, bare)
    given = compiled if where == "model" else bare
    factory = {"factory": "torch.nn:Linear", "factory_args": {"in_features": 2, "out_features": 1}}
    log_model(given, "fast", recipe=recipe, **factory)
    report = audited(client, "models:/fast/1", tmp_path / "work")
    assert report.outcome is Outcome.PASS, report.headline
    said = "Compiled code was not audited: torch.compile is used for the model" in report.headline
    assert said is (where != "nowhere")
    skipped = [row for row in report.rows if row.check == "gradient.compiled"]
    assert [row.outcome for row in skipped] == ([] if where == "nowhere" else [Outcome.SKIPPED])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_trainer_that_compiles_says_so(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra 'transformers' is not installed")
    pytest.importorskip("accelerate", reason="the extra 'transformers' is not installed")
    from registry_models.integrations.transformers import GradauditCallback
    from tests.registry_models.zoo import build

    ids = torch.randint(5, 64, (8,))
    rows = [{"input_ids": ids, "labels": ids.clone()} for _ in range(4)]
    for compiled in (False, True):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / "out"), per_device_train_batch_size=4, max_steps=1, report_to=[], use_cpu=True,
            disable_tqdm=True, torch_compile=compiled, torch_compile_backend="aot_eager" if compiled else None,
        )  # fmt: skip
        trainer = transformers.Trainer(model=build("GPT2LMHeadModel"), args=arguments, train_dataset=rows)
        optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-3)
        recipe = GradauditCallback("gpt2").capture(arguments, trainer.model, optimizer, trainer.get_train_dataloader())
        assert recipe.compiled == (("model",) if compiled else ())
