"""What pages take for granted before their first block: a model that was trained, a batch, stored results.

A function is named after its page, and returns the names that the page's blocks may use.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

import registry_models
from audits import Recipe, audit
from audits.results.format import AuditIdentity
from audits.results.store import ResultsStore
from audits.run import with_identity
from tests.audits.results.committing import commit

_MODEL = """
from torch import nn


class MyModel(nn.Sequential):
    def __init__(self, width: int = 64) -> None:
        super().__init__(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))


def build(width: int = 64) -> nn.Module:
    return MyModel(width)
"""


def readme(folder: Path) -> dict[str, Any]:
    _package(folder, "mypackage")
    store_results(folder / "demo_workspace" / "results")
    return _trained()


def own_model(folder: Path) -> dict[str, Any]:
    _package(folder, "mypackage")
    from mypackage.model import MyModel  # type: ignore[import-not-found]

    names = _trained()
    return {**names, "x": names["inputs"], "y": names["targets"], "MyModel": MyModel}


def artifact_kinds(folder: Path) -> dict[str, Any]:
    _package(folder, "package")
    names = _trained()
    recipe = _recipe(names)
    return {"registry_models": registry_models, "model": names["model"], "recipe": recipe, "NAME": "my-model"}


def result_format(folder: Path) -> dict[str, Any]:
    store_results(folder / "results")
    return {}


def optimizers(folder: Path) -> dict[str, Any]:
    return {**_trained(), "Recipe": Recipe}


def frameworks(folder: Path) -> dict[str, Any]:
    import lightning

    class MyModule(lightning.LightningModule):
        pass

    return {"lightning": lightning, "MyModule": MyModule}


def _package(folder: Path, name: str) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text("")
    for module in ("model", "module"):
        (folder / name / f"{module}.py").write_text(_MODEL)


def _trained() -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 3))
    return {
        "model": model,
        "inputs": torch.randn(16, 4),
        "targets": torch.randint(0, 3, (16,)),
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
    }


def _recipe(names: dict[str, Any]) -> Recipe:
    batch = {"inputs": names["inputs"], "targets": names["targets"]}
    return Recipe.capture(names["model"], batch=batch, loss="cross_entropy", optimizer=names["optimizer"])


def store_results(folder: Path) -> None:
    """Store and commit one audit, as that of a registered version is."""
    names = _trained()
    now = datetime.datetime.now(datetime.UTC)
    identity = AuditIdentity(audit_id="a1", audited_at=now, model_name="my-model", model_version=1)
    commit(ResultsStore(folder), with_identity(audit(names["model"], _recipe(names)), **vars(identity)))
