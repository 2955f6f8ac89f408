"""An environment that is at fault is told as such: no version is audited, marked or blamed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from mlflow.tracking import MlflowClient

from audits.errors import InfrastructureError
from audits.outcomes import Coverage, Outcome, ResultRow
from audits.report import AuditReport
from audits.results.store import ResultsStore
from flows.one_audit.canary import differs, prove_environment
from flows.sandbox import isolation
from flows.service.embedded_prefect import prefect_server
from flows.settings.environment import GradauditSettings
from registry_models.reference.reference_files import WRONG_PARAMETER
from tests.stores import register_linear

#: A build of torch whose hyperbolic tangent has a derivative that is 0.1 % off, found by every process that starts.
SICK = """
import torch


class Tanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        return 1.001 * gradient * (1 - y * y)


tanh, torch.tanh = torch.tanh, Tanh.apply
"""


@pytest.fixture
def sick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Children find a `sitecustomize` that breaks one of torch's derivatives."""
    build = tmp_path / "build"
    build.mkdir()
    build.chmod(0o755)
    (build / "sitecustomize.py").write_text(SICK)
    sound = isolation._environment

    def environment(confinement: Any) -> dict[str, str]:
        given = sound(confinement)
        return given | {"PYTHONPATH": f"{build}:{given['PYTHONPATH']}"}

    monkeypatch.setattr(isolation, "_environment", environment)
    monkeypatch.setenv("GRADAUDIT_READABLE_PATHS", f'["{build}"]')
    return monkeypatch


@pytest.fixture
def prefect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    with prefect_server():
        yield


@pytest.mark.exhaustive
@pytest.mark.end_to_end
def test_a_sick_environment_stops_the_sweep_and_marks_nothing(
    client: MlflowClient, tmp_path: Path, sick: pytest.MonkeyPatch, prefect: None
) -> None:
    from flows.nightly import nightly_audit

    for name, value in {
        "TRACKING_URI": client.tracking_uri,
        "RESULTS": str(tmp_path / "results"),
        "STATE": str(tmp_path / "state"),
    }.items():
        sick.setenv(f"GRADAUDIT_{name}", value)
    register_linear("innocent")
    state = cast("Any", nightly_audit(return_state=True))
    assert state.is_failed()
    assert "environment fault, nothing was audited or marked" in state.message
    assert "convolution" in state.message, "it names what differed"
    assert ResultsStore(tmp_path / "results").read("audits").num_rows == 0
    assert not (tmp_path / "results" / "rows").exists()
    assert client.get_model_version("innocent", "1").tags == {}
    gradaudit = client.get_experiment_by_name("gradaudit")
    assert gradaudit is not None
    assert client.search_runs([gradaudit.experiment_id]) == []
    assert not list((tmp_path / "state").glob("canary-*")), "a fault leaves no proof"

    sick.undo()
    settings = GradauditSettings.load(state=str(tmp_path / "state"))
    prove_environment(settings)
    (stamp,) = (tmp_path / "state").glob("canary-*.json")
    written = stamp.stat().st_mtime_ns
    prove_environment(settings)
    assert stamp.stat().st_mtime_ns == written, "proved once a day"


def verdict(*failed: tuple[str, str], coverage: float = 1.0) -> AuditReport:
    rows = tuple(ResultRow(check=check, outcome=Outcome.FAIL, parameter=name) for check, name in failed)
    return AuditReport(rows=rows, coverage_of=Coverage(coverage, coverage, ()))


def test_only_the_known_verdict_is_sound() -> None:
    known = ("gradient.finite-difference", WRONG_PARAMETER)
    assert differs(verdict(known)) == ""
    assert "was not found" in differs(verdict())
    assert "head.weight" in differs(verdict(known, ("gradient.finite-difference", "head.weight")))
    assert "update.rule" in differs(verdict(known, ("update.rule", WRONG_PARAMETER)))
    assert "50%" in differs(verdict(known, coverage=0.5))
    crashed = ResultRow(check="audit.completed", outcome=Outcome.INCONCLUSIVE, message="the kernel crashed")
    assert "the kernel crashed" in differs(dataclasses.replace(verdict(), rows=(crashed,)))


def test_a_host_without_a_place_for_its_proof_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InfrastructureError, match="cannot be used"):
        prove_environment(GradauditSettings.load(state=str(tmp_path / "file" / "state")))
