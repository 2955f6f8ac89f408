"""What only capture can see travels with the version: two Parameters on one memory, a model in eval mode."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pytest
import torch
from mlflow.tracking import MlflowClient
from torch import nn

from audits import Outcome, Recipe
from registry_models import log_model
from tests.registry_models.auditing import audited


class Twice(nn.Module):
    """Importable; ``joined`` is what a script does after building it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.drop = nn.Linear(4, 4), nn.Linear(4, 4), nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.drop(self.first(x).tanh()))  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.parametrize("factory", [Twice, None])
def test_it_is_said_of_the_version(
    client: MlflowClient, tmp_path: Path, factory: type[nn.Module] | None, wrong: bool
) -> None:
    mlflow.set_experiment("models")
    model = Twice()
    if wrong:
        model.second.weight.data = model.first.weight.data
        model.eval()
    batch = {"inputs": torch.randn(6, 4), "targets": torch.randn(6, 4)}
    optimizer = torch.optim.AdamW(model.parameters())
    recipe = Recipe.capture(model, batch=batch, loss="mse_loss", optimizer=optimizer)
    log_model(model, "twice", recipe=recipe, factory=factory)
    report = audited(client, "models:/twice/1", tmp_path / "a")
    assert report.outcome is (Outcome.FAIL if wrong else Outcome.PASS), report.headline
    assert report.failed_checks == (["registration.tied"] if wrong else [])
    assert ("was in eval mode when the recipe was captured" in report.headline) is wrong
