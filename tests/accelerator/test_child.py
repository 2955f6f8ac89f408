"""A directory audited by the command line's child process on a device that a library brings along."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import torch
from torch import nn

from audits import Recipe
from flows.cli import main as cli
from registry_models import log_model
from tests import accelerator
from tests.stores import BATCH

#: torch loads what is registered here when it is imported, in a child process as in any other.
ENTRY_POINT = "[torch.backends]\nemulated = emulated_backend:register\n"


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """Our three rooms, and beside them the device's library as if it had been installed."""
    try:
        extension = accelerator.built()
    except accelerator.NoCompilerError as error:
        pytest.skip(str(error))
    root, rooms = tmp_path / "installed", Path(cli.__file__).parents[2]
    for name in ("audits", "flows", "registry_models"):
        shutil.copytree(rooms / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    backend = root / "emulated_backend"
    backend.mkdir()
    shutil.copy(accelerator.__file__, backend / "__init__.py")
    shutil.copy(extension, backend / "device.so")
    facts = root / "emulated_backend-1.0.dist-info"
    facts.mkdir()
    (facts / "entry_points.txt").write_text(ENTRY_POINT)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: emulated-backend\nVersion: 1.0\n")
    return root


def directory(folder: Path, *, wrong: bool) -> Path:
    """A logged model's folder, with a recipe that holds AdamW's state."""
    mlflow.set_experiment("models")
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    held = list(model.parameters())[: 2 if wrong else 4]
    optimizer = torch.optim.AdamW(held, lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(BATCH["inputs"]), BATCH["targets"]).backward()
        optimizer.step()
    recipe = Recipe.capture(model, batch=BATCH, loss="mse_loss", optimizer=optimizer)
    info = log_model(model, "net", recipe=recipe)
    found: str = mlflow.artifacts.download_artifacts(info.model_uri, dst_path=str(folder / "model"))
    return Path(found)


@pytest.mark.end_to_end
@pytest.mark.parametrize("wrong", [False, True], ids=["right", "wrong"])
@pytest.mark.usefixtures("client")
def test_audit_of_a_directory(wrong: bool, tmp_path: Path, installed: Path) -> None:
    folder = directory(tmp_path, wrong=wrong)
    environment = {**os.environ, "PYTHONPATH": str(installed), "GRADAUDIT_READABLE_PATHS": json.dumps([str(installed)])}
    command = [
        sys.executable,
        "-P",
        "-m",
        "flows.cli",
        "audit",
        str(folder),
        "--device",
        accelerator.NAME,
        "--json",
    ]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    told = json.loads(done.stdout or "{}")
    assert told.get("device") == accelerator.NAME, done.stderr
    assert done.returncode == int(wrong)
    assert told["outcome"] == ("fail" if wrong else "pass"), told["findings"]
    if wrong:
        named = {f["parameter"] for f in told["findings"] if f["check"] == "registration.coverage"}
        assert named == {"2.weight", "2.bias"}
