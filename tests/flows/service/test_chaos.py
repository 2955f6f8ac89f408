"""The chaos script, short: servers and runs are killed during two sweeps at once, everything comes right by itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.exhaustive
@pytest.mark.end_to_end
def test_killed_servers_and_runs_leave_every_version_audited_once() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "chaos.py"), "--rounds", "2", "--versions", "2", "--seed", "3"]
    victims = ["--victims", "mlflow server", "flow run", "audit"]
    done = subprocess.run([*command, *victims], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "2 rounds, 4 versions, 4 audits" in done.stdout
    assert "SIGKILLs: {}" not in done.stdout, "something was killed"
    print(done.stdout)
