"""The reference model's files, as a registered version has them, and the verdict that is known of it."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml

from audits.recipe.recipe import Recipe
from registry_models.artifacts.factory_files import Factory, write_factory
from registry_models.recipes.recipe_files import FOLDER, write_recipe
from registry_models.reference.reference_model import ReferenceModel

#: The only parameter and the only checks that fail in a sound environment.
WRONG_PARAMETER = "wrong.scale"
EXPECTED_CHECKS = frozenset({"gradient.finite-difference"})

_SEED = 20_260_101


def write_reference(folder: Path) -> Path:
    """Write the reference model, the same every time, into ``folder`` and return that folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = ReferenceModel()
        tokens = torch.randint(0, 11, (4, 7))
        targets = torch.randint(0, 11, (4, 7))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    recipe = Recipe.capture(
        model, batch={"tokens": tokens, "targets": targets}, loss="cross_entropy", optimizer=optimizer
    )
    extra = folder / "extra_files"
    write_recipe(recipe, extra)
    factory = Factory("registry_models.reference.reference_model:ReferenceModel", {})
    write_factory(model, factory, extra / FOLDER)
    described = {"flavors": {"pytorch": {"model_data": "data"}}, "model_uuid": "reference"}
    (folder / "MLmodel").write_text(yaml.safe_dump(described), encoding="utf-8")
    return folder
