"""Commands ended by signals leave no model behind, mark nothing, and say in one line what was done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from flows.sandbox.private_folders import private_folder, remove_stale
from tests.flows.test_nightly import committed
from tests.stores import register_linear

pytestmark = pytest.mark.end_to_end


def started(folder: Path, client: MlflowClient, *arguments: str) -> subprocess.Popen[str]:
    (folder / "tmp").mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli", *arguments],
        cwd=folder,
        env={
            **os.environ,
            "MLFLOW_TRACKING_URI": client.tracking_uri,
            "HOME": str(folder / "home"),
            "PREFECT_HOME": str(folder / "prefect"),
            "TMPDIR": str(folder / "tmp"),
        },
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def private_folders(folder: Path) -> list[Path]:
    return list((folder / "tmp").glob("gradaudit-audit-*"))


def wait_until(reached: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 180
    while not reached():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_an_audit_that_is_ended_leaves_nothing(client: MlflowClient, tmp_path: Path, number: signal.Signals) -> None:
    register_linear("m")
    process = started(tmp_path, client, "audit", "models:/m/1", "--json")
    wait_until(lambda: [f for folder in private_folders(tmp_path) for f in folder.rglob("MLmodel")], process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == -number
    assert out == ""
    assert err.splitlines()[-1] == "gradaudit: stopped; nothing was marked"
    assert "Traceback" not in err
    assert private_folders(tmp_path) == []
    assert client.get_model_version("m", "1").tags == {}
    assert list((tmp_path / "results").rglob("part-*")) == []


def test_a_sweep_that_is_ended_says_what_is_left(client: MlflowClient, tmp_path: Path) -> None:
    for name in "abcd":
        register_linear(name)
    process = started(tmp_path, client, "nightly")
    wait_until(lambda: committed(tmp_path), process)
    wait_until(lambda: private_folders(tmp_path), process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGTERM
    last = err.strip().splitlines()[-1]
    done = len(committed(tmp_path))
    assert last == f"gradaudit: stopped; {done} done, {4 - done} left: the next run takes them", err
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 4 + done, err
    assert private_folders(tmp_path) == []


def test_what_a_killed_one_left_is_removed_by_the_next(client: MlflowClient, tmp_path: Path) -> None:
    register_linear("m")
    process = started(tmp_path, client, "audit", "models:/m/1")
    wait_until(lambda: [f for folder in private_folders(tmp_path) for f in folder.rglob("MLmodel")], process)
    process.kill()
    process.communicate()
    assert private_folders(tmp_path) != []
    process = started(tmp_path, client, "audit", "models:/m/1")
    process.communicate(timeout=180)
    assert process.returncode == 0
    assert private_folders(tmp_path) == []


def test_only_what_nobody_holds_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "gradaudit-audit-unknown").mkdir()
    left = tmp_path / "gradaudit-audit-left"
    left.mkdir()
    (left / ".held").write_text("")
    with private_folder() as folder:
        assert remove_stale() == 1
        assert Path(folder).is_dir()
        assert not left.exists()
        assert (tmp_path / "gradaudit-audit-unknown").is_dir(), "one that is just being made"
    assert not Path(folder).exists()
