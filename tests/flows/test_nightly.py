"""The sweep, for real: embedded Prefect, child processes, a SIGKILL in the middle."""

from __future__ import annotations

import collections
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from mlflow.tracking import MlflowClient

from audits.results.store import ResultsStore
from flows.choosing.due import plan_night
from flows.cli.main import main
from flows.cli.nightly_command import SweepStoppedError
from flows.settings.environment import GradauditSettings
from tests.flows.choosing.committing import commit
from tests.flows.commands import at_work, committed, private_folders, start, wait_until
from tests.stores import register_linear


@pytest.mark.end_to_end
def test_a_killed_sweep_is_finished_by_the_next_and_the_third_has_nothing_to_do(
    client: MlflowClient, tmp_path: Path
) -> None:
    names = ["a", "b", "c", "d"]
    for name in names:
        register_linear(name)
    sweep = start(["nightly"], tmp_path, client)
    wait_until(lambda: committed(tmp_path), sweep)
    wait_until(lambda: at_work(tmp_path), sweep)
    sweep.kill()
    sweep.communicate()
    before = len(committed(tmp_path))
    assert 1 <= before < len(names), "the kill came in the middle"
    assert at_work(tmp_path), "of an audit"

    out, err = start(["nightly"], tmp_path, client).communicate(timeout=180)
    assert f"{len(names) - before} of 4 versions were due" in out, err
    audits = ResultsStore(tmp_path / "results").read("audits").to_pandas()
    assert sorted(audits["model_name"]) == names, "every version audited exactly once"
    rows = pd.read_parquet(tmp_path / "results" / "rows")
    for name in names:
        version = client.get_model_version(name, "1")
        assert version.tags["audit.outcome"] == "pass"
        audit_id = audits.set_index("model_name").loc[name, "audit_id"]
        assert (rows["audit_id"] == audit_id).any(), "no mark without rows"
        run = client.get_run(version.tags["audit.run_id"])
        assert run.info.status == "FINISHED", "no mark without a finished run"
        assert run.data.tags["audit.id"] == audit_id
    experiment = client.get_experiment_by_name("gradaudit")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} <= {"FINISHED", "KILLED"}, "nothing is left running"
    visible = collections.Counter(r.data.tags["audit.id"] for r in runs if "superseded" not in r.data.tags)
    assert set(visible.values()) == {1}
    assert list((tmp_path / "results").rglob("*.tmp")) == []
    assert private_folders(tmp_path) == [], "what the killed sweep left is removed"

    third = start(["nightly"], tmp_path, client)
    out, err = third.communicate(timeout=120)
    assert out.startswith("Nothing is due: 4 versions looked at"), err
    assert third.returncode == 0


def settings_of(folder: Path) -> GradauditSettings:
    return GradauditSettings.load(results=str(folder / "results"))


def test_what_is_due_is_read_from_the_store_and_never_from_tags(client: MlflowClient, tmp_path: Path) -> None:
    from registry_models.registry.versions import RECIPE_TAG, list_versions

    register_linear("a")
    register_linear("b")
    client.set_model_version_tag("a", "1", "audit.outcome", "pass")
    settings = settings_of(tmp_path)

    def due(**options: Any) -> list[str]:
        return [due.version.label for due in plan_night(client, settings, **options).due if not due.reason.unchanged]

    assert due() == ["a v1", "b v1"], "a tag is no result; oldest first"
    assert due(models=["b*"]) == ["b v1"]
    for version in list_versions(client):
        commit(tmp_path, version, settings)
    assert due() == []
    assert due(force=True) == ["a v1", "b v1"]
    client.set_model_version_tag("b", "1", RECIPE_TAG, "runs:/1/audit")
    assert due() == ["b v1"], "another recipe makes a version due again"
    client.copy_model_version("models:/a/1", "copy")
    assert "copy v1" in due(), "copied tags are no audit"
    changed = settings.model_copy(update={"audit": {"seed": 1}})
    assert len(plan_night(client, changed, models=["a", "b"]).due) == 2, "other settings make everything due"


def test_unknown_parameters_are_refused() -> None:
    from prefect.exceptions import ParameterBindError

    from flows.nightly import nightly_audit

    with pytest.raises(ParameterBindError, match="'model'"):
        nightly_audit(model=["x"])


@pytest.mark.end_to_end
def test_a_flows_folder_of_the_user_s_is_not_taken_for_ours(client: MlflowClient, tmp_path: Path) -> None:
    """Prefect's server and its flow runs are started from the folder in which the user is."""
    for name in ("flows", "audits", "registry_models"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('a folder of the user\\'s was imported')\n")
    register_linear("m")
    environment = {**os.environ, "MLFLOW_TRACKING_URI": client.tracking_uri, "HOME": str(tmp_path / "home"),
                   "PREFECT_HOME": str(tmp_path / "prefect")}  # fmt: skip
    command = [sys.executable, "-P", "-m", "flows.cli", "nightly"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert client.get_model_version("m", "1").tags["audit.outcome"] == "pass"


@pytest.mark.parametrize(("done", "said"), [(3, "3 audited before that; repeat"), (0, "nothing was marked; repeat")])
def test_a_sweep_that_stops_says_what_it_had_done(
    done: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopping(*_: object, **__: object) -> None:
        raise SweepStoppedError("MLflow does not answer", done)

    monkeypatch.setattr("flows.cli.nightly_command.sweep", stopping)
    monkeypatch.setattr(sys, "argv", ["gradaudit", "nightly"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
