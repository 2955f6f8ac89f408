"""The rooms import in one direction; a planted violation is caught."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINT = Path(sys.executable).with_name("lint-imports")


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(
        [LINT, "--no-cache"], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for room in ("audits", "registry_models", "flows"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_contracts_hold(copy: Path) -> None:
    done = lint(copy)
    assert done.returncode == 0, done.stdout
    assert "6 kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("audits", "import mlflow"),
        ("audits", "from prefect import flow"),
        ("audits", "from registry_models.registry.versions import Version"),
        ("registry_models", "from prefect import flow"),
        ("registry_models", "from flows.settings.environment import GradauditSettings"),
        ("audits.checks", "import torch"),
        ("audits.checks", "from audits.live.subject import Subject"),
        ("audits.results", "from audits.recipe.recipe import Recipe"),
        ("registry_models.report", "from flows.cli.display import simple_table"),
        ("flows.service", "from flows.cli.main import main"),
        ("flows", "from flows.cli.main import main"),
    ],
)
def test_a_planted_violation_is_caught(copy: Path, room: str, line: str) -> None:
    copy.joinpath(*room.split("."), "planted.py").write_text(f"{line}\n")
    done = lint(copy)
    assert done.returncode == 1, done.stdout
    assert f"{room}.planted" in done.stdout


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("audits/outcomes.py", "from audits.report import AuditReport"),
        ("audits/lanes/lifting.py", "def late() -> None:\n    import audits.gradients.check"),
        ("audits/recipe/capture.py", "from audits.recipe.recipe import Recipe"),
        ("registry_models/artifacts/loading.py", "from registry_models.inference import infer"),
        ("flows/sandbox/limits.py", "from flows.one_audit import one_snapshot"),
    ],
)
def test_a_planted_circle_is_caught(copy: Path, module: str, line: str) -> None:
    with (copy / module).open("a") as file:
        file.write(f"\n{line}\n")
    done = lint(copy)
    assert done.returncode == 1, done.stdout
    assert "No circles within a room BROKEN" in done.stdout
