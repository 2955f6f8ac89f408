"""Whatever is raised over one version is that version's result: the others are judged, nothing is half marked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from audits.errors import InfrastructureError
from audits.outcomes import Outcome
from audits.results.store import ResultsStore
from flows.one_audit import fetching, one_version
from flows.one_audit import storing as keeping
from flows.one_audit.one_version import DUE_AGAIN, Target, audit_version
from flows.settings.environment import GradauditSettings
from registry_models import marks as marking
from registry_models.registry.versions import Version, VersionReference, list_versions
from tests.registry_models.test_marks import publish_and_mark, report
from tests.stores import register_linear

pytestmark = pytest.mark.slow

#: Model -> where its version's audit breaks: module, function, and whether a plain result would break there as well.
STAGES: dict[str, tuple[Any, str]] = {
    "fetched": (fetching, "download_version"),
    "audited": (one_version, "audit_snapshot"),
    "stored": (keeping, "rows_table"),
    "published": (keeping, "publish"),
    "marked": (keeping, "mark"),
}


class SurpriseError(Exception):
    """What nobody has thought of."""


def breaking(real: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Raise where the real one is called for the model ``name``, unless the result is only that it broke."""

    def called(*args: Any, **more: Any) -> Any:
        given = [*args, *more.values()]
        about = {v.name for v in given if isinstance(v, Version)}
        about |= {v.model_name for v in given if hasattr(v, "model_name")}
        about |= {v.identity.model_name for v in given if hasattr(v, "identity")}
        about |= {v.folder.parent.name for v in given if hasattr(v, "artifact_kind") and hasattr(v, "folder")}
        broken = any(getattr(v, "outcome", None) is Outcome.INCONCLUSIVE for v in given)
        broken |= any("own error" in v.column("cause").to_pylist() for v in given if hasattr(v, "column"))
        if name in about and not broken:
            raise SurpriseError("nobody has thought\x1b[31m of this")
        return real(*args, **more)

    return called


def test_an_exception_at_any_stage_is_one_versions_result(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*STAGES, "healthy"):
        register_linear(name)
    current: list[str] = []
    for name, (module, function) in STAGES.items():
        real = getattr(module, function)
        if name == "audited":  # knows files and not names

            def audited(*args: Any, real: Callable[..., Any] = real, **more: Any) -> Any:
                if current[-1] == "audited":
                    raise SurpriseError("nobody has thought\x1b[31m of this")
                return real(*args, **more)

            monkeypatch.setattr(module, function, audited)
        else:
            monkeypatch.setattr(module, function, breaking(real, name))
    settings = GradauditSettings.load(
        tracking_uri=client.tracking_uri, results=str(tmp_path / "results"), device="cpu", isolation="process"
    )
    for version in list_versions(client):
        current.append(version.name)
        audit_version(Target(version, "night"), client, settings)
    tags = {name: client.get_model_version(name, "1").tags for name in (*STAGES, "healthy")}
    assert {name: t["audit.outcome"] for name, t in tags.items()} == {
        **dict.fromkeys(STAGES, "inconclusive"),
        "healthy": "pass",
    }
    for name in STAGES:
        note = client.get_run(tags[name]["audit.run_id"]).data.tags["mlflow.note.content"]
        assert "nobody has thought[31m of this".replace("[", r"\[") in note, note
        assert tags[name].keys() == tags["healthy"].keys()
    committed = ResultsStore(settings.results).read("audits").to_pylist()
    assert {line["model_name"] for line in committed} == {*STAGES, "healthy"}
    assert {line["model_name"] for line in committed if line["due_key"] == DUE_AGAIN} == set(STAGES)
    experiment = client.get_experiment_by_name("gradaudit")
    assert experiment is not None
    assert {run.info.status for run in client.search_runs([experiment.experiment_id])} <= {"FINISHED", "KILLED"}


@pytest.mark.parametrize("after", range(9))
def test_marking_is_all_or_nothing(client: MlflowClient, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """The registry refuses the n-th thing that is written; then everything is as it was before."""
    register_linear("m")
    client.update_model_version("m", "1", "the user's own text")
    publish_and_mark(client, report(outcome=Outcome.PASS))
    before, latest = client.get_model_version("m", "1"), client.get_registered_model("m").tags
    written: list[str] = []

    def refusing(name: str) -> Callable[..., Any]:
        real = getattr(client, name)

        def called(*args: Any, **more: Any) -> Any:
            written.append(name)
            if len(written) == after + 1:
                raise MlflowException("INVALID_PARAMETER_VALUE: too long")
            return real(*args, **more)

        return called

    for name in ("update_model_version", "set_model_version_tag", "delete_model_version_tag"):
        monkeypatch.setattr(client, name, refusing(name))
    with pytest.raises((InfrastructureError, MlflowException)):
        marking.mark(client, report(minute=5, audit_id="a2"), VersionReference("m", 1).resolve(client),
                     run_id="r2", experiment_id="1", fingerprint="f2")  # fmt: skip
    now = client.get_model_version("m", "1")
    assert (now.tags, now.description) == (before.tags, before.description)
    assert client.get_registered_model("m").tags == latest == {"audit.latest": "v1 pass"}


def test_names_as_long_as_they_like_are_marked_whole(client: MlflowClient) -> None:
    register_linear("m")
    what = report()
    rows = tuple(
        row.__class__(**{**vars(row), "parameter": "x" * 400 + str(n)}) for n in range(400) for row in what.rows[2:3]
    )
    long = what.__class__(rows=(*what.rows, *rows), coverage_of=what.coverage_of, identity=what.identity, seconds=1.0)
    publish_and_mark(client, long)
    tags = client.get_model_version("m", "1").tags
    assert tags["audit.outcome"] == "fail"
    assert len(tags["audit.failed_parameters"]) <= 5000
    assert tags["audit.failed_parameters"].endswith("…")
