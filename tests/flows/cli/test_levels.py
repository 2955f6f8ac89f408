"""What an installation without a part says and does: imports are kept back here, `.ci/wheel` installs each level."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from audits.parts import EXTRAS, NO_PIPELINE, missing_part
from docs.generate.commands_page import commands
from flows.cli.light import _COMMANDS, PIPELINE_COMMANDS
from tests.docs.prepared import store_results

ROOT = Path(__file__).resolve().parents[3]

#: An import of these names finds nothing in the process that runs it.
_WITHOUT = """
import sys

class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in {names!r} else real(name, package)
sys.meta_path.insert(0, Without())
"""

PACKAGES = {"light": {p for _, packages in EXTRAS.values() for p in packages} - {"filelock", "jinja2", "markupsafe"}}
PACKAGES["attest"] = PACKAGES["light"] - {"securesystemslib"}
PACKAGES["mlflow"] = {"prefect", "typer", "pydantic_settings", "duckdb"}  # MLflow brings the pipeline's others itself


def at_level(level: str, code: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code where only a level's packages can be imported."""
    return subprocess.run(
        [sys.executable, "-c", _WITHOUT.format(names=sorted(PACKAGES[level])) + code, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def gradaudit(level: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return at_level(level, "from flows.cli.entry import main\nmain()", folder, *arguments)


def test_the_extras_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    light = {re.split(r"[><=\[]", line)[0] for line in project["dependencies"]}
    assert light == {"torch", "numpy", "pandas", "pyarrow"}
    modules = {"pyyaml": "yaml", "pydantic-settings": "pydantic_settings"}
    for extra, (_, packages) in EXTRAS.items():
        named = {re.split(r"[><=\[]", line)[0] for line in project["optional-dependencies"][extra]} - {"gradaudit"}
        assert {modules.get(name, name) for name in named} == set(packages), extra


def test_each_command_is_light_or_the_pipelines() -> None:
    assert set(commands()) - set(_COMMANDS) == set(PIPELINE_COMMANDS)
    assert set(_COMMANDS) <= set(commands())


@pytest.mark.end_to_end
@pytest.mark.parametrize("level", ["light", "mlflow"])
@pytest.mark.parametrize("command", [["nightly"], ["audit", "models:/m/1"], ["sql", "select 1"], ["up", "--help"]])
def test_a_command_of_the_pipeline_is_refused_with_the_cure(level: str, command: list[str], tmp_path: Path) -> None:
    done = gradaudit(level, tmp_path, *command)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"gradaudit: {NO_PIPELINE}\n")


@pytest.mark.end_to_end
def test_the_light_commands(tmp_path: Path) -> None:
    store_results(tmp_path / "results")
    assert "gradient.finite-difference" in gradaudit("light", tmp_path, "checks").stdout
    assert "where to look" in gradaudit("light", tmp_path, "explain", "update.rule").stdout
    shown = gradaudit("light", tmp_path, "report", "models:/my-model/1")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("PASS")
    aliased = gradaudit("light", tmp_path, "report", "models:/my-model@prod")
    assert aliased.returncode == 2
    assert NO_PIPELINE in aliased.stderr
    wrong = gradaudit("light", tmp_path, "chekcs")
    assert wrong.returncode == 2
    assert "did you mean 'checks'" in wrong.stderr
    assert NO_PIPELINE in " ".join(gradaudit("light", tmp_path, "--help").stdout.split())


@pytest.mark.end_to_end
def test_the_registry_part_is_named_where_it_is_missing(tmp_path: Path) -> None:
    done = at_level("light", "from registry_models import log_model", tmp_path)
    assert done.returncode == 1
    assert "pip install 'gradaudit[mlflow]'" in done.stderr
    assert at_level("mlflow", "from registry_models import attach_recipe, log_model", tmp_path).returncode == 0


@pytest.mark.end_to_end
@pytest.mark.slow
def test_an_audit_needs_the_light_level_alone(tmp_path: Path) -> None:
    script = str(ROOT / ".ci" / "light_audit.py")
    done = at_level("light", f"import runpy; runpy.run_path({script!r}, run_name='__main__')", tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_module_that_belongs_to_no_part_is_no_missing_part() -> None:
    assert missing_part(ModuleNotFoundError("No module named 'theirs'", name="theirs")) is None
    found = missing_part(ModuleNotFoundError("No module named 'duckdb.x'", name="duckdb.x"))
    assert found is not None
    assert "'gradaudit[pipeline]'" in str(found)
