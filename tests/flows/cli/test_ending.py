"""Commands ended by signals leave no model behind, mark nothing, and say in one line what was done."""

from __future__ import annotations

import signal
import tempfile
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from flows.sandbox.private_folders import private_folder, remove_stale
from tests.flows.commands import committed, private_folders, start, wait_until
from tests.stores import register_linear

pytestmark = pytest.mark.end_to_end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_an_audit_that_is_ended_leaves_nothing(client: MlflowClient, tmp_path: Path, number: signal.Signals) -> None:
    register_linear("m")
    process = start(["audit", "models:/m/1", "--json"], tmp_path, client)
    wait_until(lambda: [f for folder in private_folders(tmp_path) for f in folder.rglob("MLmodel")], process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == -number
    assert out == ""
    assert err.splitlines()[-1] == "gradaudit: stopped; nothing was marked"
    assert "Traceback" not in err
    assert private_folders(tmp_path) == []
    assert client.get_model_version("m", "1").tags == {}
    assert list((tmp_path / "results" / "rows").rglob("part-*")) == []


@pytest.mark.exhaustive
def test_a_sweep_that_is_ended_says_what_is_left(client: MlflowClient, tmp_path: Path) -> None:
    for name in "abcd":
        register_linear(name)
    process = start(["nightly"], tmp_path, client)
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


@pytest.mark.exhaustive
def test_what_a_killed_one_left_is_removed_by_the_next(client: MlflowClient, tmp_path: Path) -> None:
    register_linear("m")
    process = start(["audit", "models:/m/1"], tmp_path, client)
    wait_until(lambda: [f for folder in private_folders(tmp_path) for f in folder.rglob("MLmodel")], process)
    process.kill()
    process.communicate()
    assert private_folders(tmp_path) != []
    process = start(["audit", "models:/m/1"], tmp_path, client)
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
