"""``gradaudit demo``, as a newcomer runs it: every planted bug found, no right version blamed, all of it on record."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from mlflow.tracking import MlflowClient

from flows.demo.catalogue import DEMO_VERSIONS

#: What the failing rows of each planted version must name: a check and a parameter.
PLANTED = {
    ("digits-classifier", 2): ("gradient.finite-difference", "blocks.0.convolution.weight"),
    ("digits-gan", 2): ("update.isolation", "generator.0.weight"),
    ("char-gpt", 2): ("registration.stale", "head.weight"),
    ("frozen-features", 2): ("update.frozen", "backbone.1.weight"),
}


def demo(folder: Path) -> tuple[int, dict[str, object], str]:
    environment = {**os.environ, "HOME": str(folder / "home"), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "demo", "--folder", "place", "--json"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout), done.stderr


@pytest.mark.exhaustive
@pytest.mark.end_to_end
def test_every_planted_bug_is_found_and_no_right_version_is_blamed(tmp_path: Path) -> None:
    code, result, log = demo(tmp_path)
    assert (code, result["surprises"], result["audited"]) == (0, [], len(DEMO_VERSIONS)), log
    place = tmp_path / "place"
    client = MlflowClient(tracking_uri=f"sqlite:///{place / 'mlflow.db'}")
    failing = {(v.name, int(v.version)): v for v in client.search_model_versions("tags.`audit.outcome` = 'fail'")}
    assert set(failing) == {(v.name, v.version) for v in DEMO_VERSIONS if v.planted} == set(PLANTED)
    rows = pd.read_parquet(place / "results" / "rows")
    for key, (check, parameter) in PLANTED.items():
        version = failing[key]
        run = client.get_run(version.tags["audit.run_id"])
        assert run.data.metrics["audit.n_failed"] >= 1
        artifacts = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
        assert {"report.html", "parameters.json", "parameters.csv", "rows.parquet", "plots"} <= artifacts
        assert parameter in version.tags["audit.failed_parameters"].split(",")
        own = rows[(rows.model_name == key[0]) & (rows.model_version == key[1])]
        assert parameter in set(own[(own.check == check) & (own.outcome == "fail")].parameter)
        assert not own.duplicated(["check", "parameter", "phase", "step", "lane", "message"]).any()
    right = rows[
        [(name, version) not in PLANTED for name, version in zip(rows.model_name, rows.model_version, strict=True)]
    ]
    assert not (right.outcome == "fail").any()
    assert not (rows.check == "audit.completed").any(), "every part of every audit ran"
    shown = {(v["model"], v["version"]): v for v in result["verdicts"]}
    for key, version in failing.items():  # the table names first what the mark names first: the audit's own order
        assert shown[key]["failed_parameters"][0] == version.tags["audit.failed_parameters"].split(",")[0]
        assert shown[key]["failed_checks"] == version.tags["audit.failed_checks"].split(",")
    again, result, _ = demo(tmp_path)
    assert (again, result["audited"], result["surprises"]) == (0, 0, []), "a second run reuses what is there"
