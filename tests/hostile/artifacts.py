"""Model directories as an attacker would write them."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from registry_models.recipes.recipe_files import write_recipe
from tests.stores import linear_recipe

MLMODEL = f"flavors:\n  pytorch:\n    model_data: data\n    code: code\n    pytorch_version: {torch.__version__}\n"


def solved() -> nn.Linear:
    """The tutorial's model near its solution, which an audit finds nothing wrong with."""
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.05, 1.0]]))
        model.bias.fill_(0.1)
    return model


class Payload:
    """Runs ``source`` when it is unpickled, and leaves a model in its own place."""

    def __init__(self, source: str) -> None:
        self.source = source

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("[exec(SOURCE, NAMES), MODEL][1]", {"SOURCE": self.source, "NAMES": {}, "MODEL": solved()})


def model_directory(folder: Path, content: Any, *, mlmodel: str = MLMODEL) -> Path:
    """A pickled model with a recipe; ``content`` is what is pickled."""
    (folder / "data").mkdir(parents=True)
    (folder / "code").mkdir()
    (folder / "MLmodel").write_text(mlmodel)
    torch.save(content, folder / "data" / "model.pth")
    write_recipe(linear_recipe(solved()), folder / "extra_files")
    return folder


def zip_bomb(path: Path, *, mebibytes: int = 1024) -> None:
    """A torch archive, small on disk, whose one record expands."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("model/data/0", "w") as record:
        for _ in range(mebibytes):
            record.write(bytes(1 << 20))
