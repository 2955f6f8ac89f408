"""The fixture ``audit`` in a project's own tests: what a failed test shows, and that pytest starts as fast."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

_TESTS = """
import pytest

from tests.audits.model_files import faulty


def test_right(audit):
    assert audit(*faulty.audit_right()).passed


@pytest.mark.parametrize("fault", ["backward", "backward64"])
def test_wrong(audit, fault):
    assert audit(*getattr(faulty, f"audit_{fault}")()).passed


def test_fails_by_itself(audit):
    assert audit(*faulty.audit_right()).passed
    assert 1 == 2
"""


def run_pytest(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "audits.pytest_plugin", "-p", "no:cacheprovider", *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.end_to_end
@pytest.mark.slow
def test_a_failed_test_shows_root_findings_and_causes(tmp_path: Path) -> None:
    (tmp_path / "test_models.py").write_text(_TESTS)
    done = run_pytest(tmp_path, "-W", "error")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "3 failed, 1 passed" in done.stdout
    sections = done.stdout.split(" gradaudit ")
    assert len(sections) == 3, "one section for each audit that did not pass, none for one that did"
    for section in sections[1:]:
        assert "FAIL: Doubled's backward is wrong" in section
        assert "fail: Doubled's backward is wrong: 4 parameters, from 0.weight" in section
        assert "seen by gradient.finite-difference, gradient.input" in section
        assert "Doubled.backward, used by Block (1)" in section
    assert "<AuditReport FAIL: Doubled's backward is wrong" in done.stdout
    assert "ResultRow(" not in done.stdout, "a thousand rows in an assertion are not readable"


@pytest.mark.end_to_end
def test_collecting_imports_no_torch(tmp_path: Path) -> None:
    (tmp_path / "test_models.py").write_text("def test_trains(audit):\n    assert audit\n")
    (tmp_path / "conftest.py").write_text(
        "import sys\n\n\ndef pytest_sessionfinish():\n"
        "    print('imported:', [name for name in ('torch', 'pandas', 'mlflow') if name in sys.modules])\n"
    )
    done = run_pytest(tmp_path, "-s")
    assert done.returncode == 0, done.stdout
    assert "imported: []" in done.stdout


def test_pytest_finds_the_plugin() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"gradaudit": "audits.pytest_plugin"}
