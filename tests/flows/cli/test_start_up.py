"""What commands import: nobody waits for torch, MLflow or Prefect who needs none of them."""

from __future__ import annotations

import json
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


def test_an_audit_starts_its_process_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    code = "import sys; before = set(sys.modules); import flows.cli.audit_command; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True)
    imported = set(done.stdout.split())
    assert "flows.sandbox.standby" in imported
    assert not imported & {"torch", "numpy", "pandas", "pyarrow", "mlflow", "sqlalchemy", "matplotlib"}


#: Runs an audit's process and says which modules of torch came only after the request was read.
_LATE = """
import sys
from registry_models.child import carrying_out

carry_out = carrying_out.run

def run(request):
    early = set(sys.modules)
    try:
        return carry_out(request)
    finally:
        print(*(name for name in set(sys.modules) - early if name.partition(".")[0] in ("torch", "sympy", "numpy")))

carrying_out.run = run
carrying_out.main()
"""


def test_an_audits_process_has_imported_torch_whole_before_its_request(tmp_path: Path) -> None:
    from registry_models.artifacts.snapshot import read_snapshot
    from registry_models.child.answer import read_answer
    from registry_models.reference.reference_files import WRONG_PARAMETER, write_reference

    request = read_snapshot(write_reference(tmp_path / "model")).request()
    with (tmp_path / "answer").open("wb") as answer:
        request |= {"settings": {}, "device": "cpu", "answer": answer.fileno()}
        done = subprocess.run(
            [sys.executable, "-c", _LATE],
            cwd=ROOT,
            input=json.dumps(request),
            pass_fds=(answer.fileno(),),
            text=True,
            capture_output=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert WRONG_PARAMETER in read_answer(tmp_path / "answer").failed_parameters
    assert len(done.stdout.split()) < 20, "torch._dynamo alone brings 600, a second of an audit's three"


def test_the_witness_sees_what_is_imported(tmp_path: Path) -> None:
    (tmp_path / "none.db").write_text("")
    done = run(tmp_path, "report", "models:/net@champion", "--tracking-uri", f"sqlite:///{tmp_path}/none.db")
    assert done.returncode == 2
    assert "'mlflow'" in done.stderr.splitlines()[-1], "an alias is the registry's to resolve"
