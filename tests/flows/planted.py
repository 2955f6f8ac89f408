"""Model directories made for one purpose, without a registry."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml

from audits import Recipe
from registry_models.artifacts.factory_files import Factory, write_factory
from registry_models.recipes.recipe_files import FOLDER, write_recipe


def write_wide(folder: Path) -> Path:
    """A network of 1,800 parameters whose exact check holds 64 copies of large activations at a time."""
    torch.manual_seed(0)
    arguments = {"channels": 32}
    factory = Factory("tests.flows.planted:wide", arguments)
    model = factory.build()
    batch = {"inputs": torch.randn(12, 3, 32, 32), "targets": torch.randn(12, 3, 32, 32)}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    write_recipe(Recipe.capture(model, batch=batch, loss="mse_loss", optimizer=optimizer), folder / "extra_files")
    write_factory(model, factory, folder / "extra_files" / FOLDER)
    (folder / "MLmodel").write_text(yaml.safe_dump({"flavors": {"pytorch": {"model_data": "data"}}}))
    return folder


def wide(channels: int) -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, channels, 3, padding=1), torch.nn.Tanh(), torch.nn.Conv2d(channels, 3, 3, padding=1)
    )
