"""A night on real workers, and beside it a second sweep: every version is audited once, by one of them."""

from __future__ import annotations

import collections
import datetime
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.tracking import MlflowClient
from prefect.client.orchestration import get_client

from audits.results.store import ResultsStore
from flows.choosing.due import Due, Reason
from flows.choosing.shards import SMALLEST_SHARD, cut, run_on_workers, workers_wait
from flows.service.embedded_prefect import prefect_server
from flows.service.setup import SetupOptions, set_up
from flows.settings.environment import GradauditSettings
from registry_models.registry.versions import Version
from tests.stores import register_linear

NAMES = ["a", "b", "c", "d"]


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that gradaudit is set up on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(tmp_path_factory.mktemp("prefect")))
        with prefect_server() as url:
            assert not workers_wait(), "there is no deployment yet"
            set_up(SetupOptions())
            yield url


@pytest.fixture
def worker(prefect: str, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A worker of the queue for nights."""
    for name, value in {
        "GRADAUDIT_TRACKING_URI": client.tracking_uri,
        "GRADAUDIT_RESULTS": str(tmp_path / "results"),
        "GRADAUDIT_STATE": str(tmp_path / "state"),
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "MLFLOW_TRACKING_URI": client.tracking_uri,
    }.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "gpu", "--work-queue", "nightly"]
    with (tmp_path / "worker.log").open("w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=dict(os.environ), stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 90
            while not workers_wait():
                assert process.poll() is None, (tmp_path / "worker.log").read_text()
                assert time.monotonic() < deadline, "the worker did not come online"
                time.sleep(0.5)
            yield
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.mark.exhaustive
@pytest.mark.end_to_end
@pytest.mark.usefixtures("prefect")
def test_a_night_does_not_wait_for_workers_for_ever() -> None:
    assert not workers_wait(), "there is a deployment, and no worker"
    now = datetime.datetime.now(datetime.UTC)
    shards = cut([due(0, 1.0)], GradauditSettings.load())
    troubles = run_on_workers(shards, occasion="tonight", chosen_at=now, at_once=2, patience=3.0)
    assert troubles == ["no worker took up m0 v1"]
    with get_client(sync_client=True) as prefect:
        (run,) = (run for run in prefect.read_flow_runs() if (run.idempotency_key or "").startswith("tonight-"))
    assert run.state is not None
    assert run.state.is_cancelled(), "nothing is left behind"
    assert run.idempotency_key == f"tonight-{shards[0].identity}-attempt1"


@pytest.mark.exhaustive
@pytest.mark.end_to_end
@pytest.mark.usefixtures("worker")
def test_a_night_on_workers_beside_a_second_sweep(client: MlflowClient, tmp_path: Path) -> None:
    from flows.nightly import nightly_audit

    for name in NAMES:
        register_linear(name)
    alone = {k: v for k, v in os.environ.items() if k != "PREFECT_API_URL"}
    alone["PREFECT_HOME"] = str(tmp_path / "prefect-of-the-second")
    second = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "nightly"],
        cwd=tmp_path,
        env=alone,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    state = cast("Any", nightly_audit(return_state=True))
    out, _ = second.communicate(timeout=240)
    assert state.is_completed(), state.message
    assert second.returncode == 0, out

    audits = ResultsStore(tmp_path / "results").read("audits").to_pandas()
    assert sorted(audits["model_name"]) == NAMES, "every version audited once, by one of the two"
    gradaudit = client.get_experiment_by_name("gradaudit")
    assert gradaudit is not None
    runs = client.search_runs([gradaudit.experiment_id])
    assert collections.Counter(run.data.tags["audit.model"] for run in runs) == dict.fromkeys(NAMES, 1)
    for name in NAMES:
        assert client.get_model_version(name, "1").tags["audit.outcome"] == "pass"

    result = state.result()
    assert sorted(summary["model"] for summary in result["audited"]) == NAMES
    nights = client.get_experiment_by_name("gradaudit-nightly")
    assert nights is not None
    night = client.get_run(result["run_id"])
    assert night.info.experiment_id == nights.experiment_id
    assert night.data.metrics["night.audited"] == len(NAMES)
    assert "4 of 4 versions audited" in night.data.tags["night.headline"]
    with get_client(sync_client=True) as prefect:
        deployment = prefect.read_deployment_by_name("audit-versions/nightly")
        runs_of_it = [run for run in prefect.read_flow_runs() if run.deployment_id == deployment.id]
        artifacts = {artifact.key for artifact in prefect.read_artifacts()}
    handed = [run for run in runs_of_it if not (run.idempotency_key or "").startswith("tonight-")]
    assert len(handed) == 1, "one shard"
    assert handed[0].state is not None
    assert handed[0].state.is_completed()
    assert {"night", "night-versions", "audit-versions"} <= artifacts


def due(index: int, seconds: float) -> Due:
    version = Version(f"m{index}", 1, "", index, None, "", {})
    return Due(version, Reason.CHANGED, seconds)


@given(
    st.lists(st.floats(min_value=1.0, max_value=4000.0), max_size=60),
    st.floats(min_value=1.0, max_value=60.0),
    st.integers(min_value=1, max_value=9),
)
def test_a_night_is_cut_into_shards_of_about_equal_cost(seconds: list[float], minutes: float, at_once: int) -> None:
    settings = GradauditSettings.load(shard_minutes=minutes, shards_at_once=at_once)
    night = [due(index, value) for index, value in enumerate(seconds)]
    shards = cut(night, settings)
    dealt = [uri for shard in shards for uri in shard.versions]
    assert sorted(dealt) == sorted(d.version.uri for d in night), "each version in one shard"
    order = {d.version.uri: position for position, d in enumerate(night)}
    for shard in shards:
        assert [order[uri] for uri in shard.versions] == sorted(order[uri] for uri in shard.versions)
        assert shard.seconds <= sum(seconds) / len(shards) + max(seconds) + 1e-6
    if seconds and sum(seconds) < SMALLEST_SHARD and sum(seconds) <= minutes * 60:
        assert len(shards) == 1, "a short night is not worth a second flow run"
    assert len({shard.identity for shard in shards}) == len(shards)
