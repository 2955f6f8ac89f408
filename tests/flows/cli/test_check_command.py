"""``gradaudit check`` and the files of `examples/` for CI: their commands are run as they are written there."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.flows.cli.test_levels import ROOT, gradaudit

EXAMPLES = ROOT / "examples"
FAULTY = ROOT / "tests" / "audits" / "model_files" / "faulty.py"

WORKFLOW = yaml.safe_load((EXAMPLES / "github_workflow.yml").read_text())
JOB = yaml.safe_load((EXAMPLES / "gitlab_job.yml").read_text())["audit"]
STEPS = WORKFLOW["jobs"]["audit"]["steps"]


def commands() -> list[str]:
    """The commands of both that are not the installation, which `.ci/wheel` runs."""
    written = [step["run"] for step in STEPS if "run" in step] + JOB["script"]
    assert written.count("pip install gradaudit") == 2
    return [command for command in written if command != "pip install gradaudit"]


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command line as a runner's shell would; ``gradaudit`` is this checkout's."""
    binaries = folder / "bin"
    binaries.mkdir(exist_ok=True)
    (binaries / "gradaudit").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m flows.cli "$@"\n')
    (binaries / "gradaudit").chmod(0o755)
    environment = {**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    script = ["bash", "-euo", "pipefail", "-c", command]
    return subprocess.run(script, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_workflow_and_the_job_are_what_their_runners_read() -> None:
    assert WORKFLOW[True] == {"pull_request": None}, "YAML reads the key `on` as true; GitHub reads it as `on`"
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert [step["uses"].partition("@")[0] for step in STEPS if "uses" in step] == [
        "actions/checkout",
        "actions/setup-python",
    ]
    assert all(set(step) <= {"name", "uses", "with", "run"} for step in STEPS)
    assert set(JOB) == {"image", "rules", "script", "artifacts"}
    report = JOB["artifacts"]["reports"]["codequality"]
    assert f"--gitlab {report}" in JOB["script"][-1]
    assert JOB["artifacts"]["when"] == "always", "a report of a failed job is the one that is wanted"


@pytest.mark.end_to_end
@pytest.mark.slow
@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_examples_runs(command: str, tmp_path: Path) -> None:
    for file in EXAMPLES.glob("*.py"):
        shutil.copy(file, tmp_path)
    done = run(command, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "::error" not in done.stdout
    if "--gitlab" in command:
        assert json.loads((tmp_path / "gl-code-quality-report.json").read_text()) == []
    shutil.copy(FAULTY, tmp_path / "audit_model.py")
    done = run(command, tmp_path)
    assert done.returncode == 1, done.stderr
    if "--github" in command:
        first, *_ = [line for line in done.stdout.splitlines() if line.startswith("::error")]
        assert first.startswith("::error file=audit_model.py,line=16,title=gradaudit%3A Doubled's backward is wrong::")
    else:
        assert len(json.loads((tmp_path / "gl-code-quality-report.json").read_text())) >= 5


@pytest.mark.end_to_end
@pytest.mark.slow
def test_the_example_test_passes(tmp_path: Path) -> None:
    for file in EXAMPLES.glob("*.py"):
        shutil.copy(file, tmp_path)
    plugin = (
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 {} -m pytest -q -p audits.pytest_plugin -p no:cacheprovider test_model.py"
    )
    done = run(plugin.format(shlex.quote(sys.executable)), tmp_path)
    assert "1 passed" in done.stdout, done.stdout


@pytest.mark.end_to_end
@pytest.mark.slow
@pytest.mark.parametrize("level", ["light", "whole"])
def test_results_are_apart_from_what_the_file_prints(level: str, tmp_path: Path) -> None:
    arguments = ["check", f"{FAULTY}:audit_backward", "--json"]
    if level == "light":
        done = gradaudit("light", ROOT, *arguments)
    else:
        done = run(f"cd {shlex.quote(str(ROOT))} && gradaudit {shlex.join(arguments)}", tmp_path)
    assert done.returncode == 1, done.stderr
    assert "a model prints" in done.stderr
    (told,) = json.loads(done.stdout)["audits"]
    assert (told["function"], told["outcome"]) == ("audit_backward", "fail")
    place = told["causes"][0]["place"]
    assert (place["file"], place["line"]) == ("tests/audits/model_files/faulty.py", 16)


@pytest.mark.end_to_end
@pytest.mark.slow
def test_what_a_report_says_is_no_command_of_the_runner_and_trouble_is_annotated(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text((EXAMPLES / "audit_model.py").read_text())
    lines = run("gradaudit check good.py --github", tmp_path).stdout.splitlines()
    assert lines[0].startswith("::stop-commands::")
    assert lines[-1] == f"::{lines[0].rpartition('::')[2]}::"
    (tmp_path / "broken.py").write_text("def audit_it():\n    raise ValueError('100%\\nno data')\n")
    done = run("gradaudit check broken.py --github", tmp_path)
    assert done.returncode == 2
    assert done.stdout.startswith("::error file=broken.py,line=1,title=gradaudit could not judge::broken.py:audit_it ")
    assert "100%25%0Ano data" in done.stdout
