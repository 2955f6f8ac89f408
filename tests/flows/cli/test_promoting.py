"""`examples/promote.py` moves an alias only when the gate lets the version through."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from tests.flows.cli.test_gate import register_wrong
from tests.stores import register_linear

SCRIPT = Path(__file__).resolve().parents[3] / "examples" / "promote.py"


def promote(client: MlflowClient, folder: Path, candidate: str) -> subprocess.CompletedProcess[str]:
    """Run the script as its user does; the command ``gradaudit`` on the path is this checkout's."""
    binaries = folder / "bin"
    binaries.mkdir(exist_ok=True)
    command = binaries / "gradaudit"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m flows.cli "$@"\n')
    command.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "PYTHONPATH": str(SCRIPT.parents[1]),
        "MLFLOW_TRACKING_URI": client.tracking_uri,
    }
    command_line = [sys.executable, str(SCRIPT), candidate, "production"]
    return subprocess.run(command_line, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.end_to_end
@pytest.mark.slow
def test_only_what_passes_is_promoted(client: MlflowClient, tmp_path: Path) -> None:
    register_linear("net")
    register_wrong("net")
    for version, code in (("2", 1), ("3", 2)):
        done = promote(client, tmp_path, f"models:/net/{version}")
        assert done.returncode == code, done.stderr
        assert "is not promoted" in done.stdout
        with pytest.raises(MlflowException):
            client.get_model_version_by_alias("net", "production")
    client.set_registered_model_alias("net", "candidate", "1")
    done = promote(client, tmp_path, "models:/net@candidate")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "net v1 is @production now\n"
    assert str(client.get_model_version_by_alias("net", "production").version) == "1"
