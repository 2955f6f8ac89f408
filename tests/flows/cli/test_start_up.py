"""What commands import: nobody waits for torch, MLflow or Prefect who needs none of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from audits.results.store import ResultsStore
from tests.audits.results.committing import commit, report, row

ROOT = Path(__file__).resolve().parents[3]

#: Prints, at the end of any command, which of the heavy libraries it has imported.
_WITNESS = (
    "import atexit, sys\n"
    "heavy = ('torch', 'mlflow', 'prefect', 'sqlalchemy', 'matplotlib')\n"
    "atexit.register(lambda: print([n for n in heavy if n in sys.modules], file=sys.stderr))\n"
)

pytestmark = pytest.mark.end_to_end


def run(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    (folder / "witness").mkdir(exist_ok=True)
    (folder / "witness" / "sitecustomize.py").write_text(_WITNESS)
    path = os.pathsep.join(filter(None, [str(folder / "witness"), str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, **variables},
        text=True,
        capture_output=True,
        check=False,
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["audit", "--help"],
        ["checks"],
        ["checks", "--json"],
        ["explain", "gradient.finite-difference"],
        ["settings"],
        ["history", "net"],
        ["sql", "SELECT outcome FROM audits"],
        ["report", "models:/net/1"],
        ["report", "models:/net/1", "--json"],
        ["diff", "models:/net/1", "models:/net/1"],
        ["compact"],
    ],
    ids=" ".join,
)
def test_a_command_imports_neither_torch_nor_mlflow_nor_prefect(arguments: list[str], tmp_path: Path) -> None:
    commit(ResultsStore(tmp_path / "results"), report(row("pass"), model="net"))
    done = run(tmp_path, *arguments)
    assert done.stdout, done.stderr  # the exit code of a report is its audit's
    assert done.stderr.rstrip().splitlines()[-1] == "[]"


def test_the_names_that_a_shell_completes_come_without_them(tmp_path: Path) -> None:
    done = run(tmp_path, _GRADAUDIT_COMPLETE="complete_bash", COMP_WORDS="gradaudit ex", COMP_CWORD="1")
    assert done.stderr.rstrip().splitlines()[-1] == "[]"


def test_the_parent_of_an_audit_imports_no_torch(tmp_path: Path) -> None:
    from registry_models.reference.reference_files import WRONG_PARAMETER, write_reference

    done = run(tmp_path, "audit", str(write_reference(tmp_path / "model")), "--json", "--device", "cpu")
    assert done.returncode == 1, done.stderr
    assert WRONG_PARAMETER in done.stdout
    imported = done.stderr.rstrip().splitlines()[-1]
    assert imported.startswith("[")
    assert "torch" not in imported


def test_the_witness_sees_what_is_imported(tmp_path: Path) -> None:
    (tmp_path / "none.db").write_text("")
    done = run(tmp_path, "report", "models:/net@champion", "--tracking-uri", f"sqlite:///{tmp_path}/none.db")
    assert done.returncode == 2
    assert "'mlflow'" in done.stderr.splitlines()[-1], "an alias is the registry's to resolve"
