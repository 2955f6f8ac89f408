"""``gradaudit audit``: exit codes, JSON as agreed, marks only after a whole audit, one sentence on trouble."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import torch
from mlflow.tracking import MlflowClient
from torch import nn

from audits import Recipe
from flows.cli import main as cli
from flows.one_audit.one_version import rerun_command
from registry_models import log_model
from registry_models.registry.versions import Version, VersionReference
from tests.stores import BATCH, register_linear


def gradaudit(*arguments: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> int:
    """Run the command line in this process and return its exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gradaudit", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    code = ended.value.code
    assert isinstance(code, int)
    return code


@pytest.fixture
def run(client: MlflowClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):  # type: ignore[no-untyped-def]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)
    return lambda *arguments: gradaudit(*arguments, monkeypatch=monkeypatch, tmp_path=tmp_path)


def register_with_a_lost_head(name: str) -> None:
    """The optimizer is built before the head is replaced."""
    mlflow.set_experiment("models")
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model[2] = nn.Linear(4, 1)
    log_model(model, name, recipe=Recipe.capture(model, batch=BATCH, loss="mse_loss", optimizer=optimizer))


def tags(client: MlflowClient, name: str) -> dict[str, str]:
    return VersionReference(name, 1).resolve(client).tags


@pytest.mark.end_to_end
def test_a_right_version_passes_and_is_marked(run, client: MlflowClient, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    register_linear("right")
    capsys.readouterr()
    assert run("audit", "models:/right/1", "--json", "--junit", "junit.xml", "--html", "report.html") == 0
    printed = json.loads(capsys.readouterr().out)
    assert {key: printed[key] for key in ("schema", "model", "version", "outcome", "coverage", "artifact_kind")} == {
        "schema": 1,
        "model": "right",
        "version": 1,
        "outcome": "pass",
        "coverage": 1.0,
        "artifact_kind": "eager",
    }
    assert set(printed["counts"]) == {"pass", "warn", "fail", "inconclusive", "skipped"}
    assert {"check", "reason"} == set(printed["not_checked"][0])
    assert tags(client, "right")["audit.outcome"] == "pass"
    assert tags(client, "right")["audit.run_id"] == printed["run_id"]
    rows = pd.read_parquet(tmp_path / "results" / "rows")
    assert set(rows["audit_id"]) == {printed["audit_id"]}
    assert {"weight", "bias"} <= set(rows["parameter"].dropna())
    suite = ET.parse(tmp_path / "junit.xml").getroot()[0]
    assert int(suite.attrib["tests"]) == len(rows)
    assert suite.attrib["failures"] == "0"
    assert "<html" in (tmp_path / "report.html").read_text()


@pytest.mark.end_to_end
def test_a_wrong_version_fails_naming_the_parameter(run, client: MlflowClient, capsys) -> None:  # type: ignore[no-untyped-def]
    register_with_a_lost_head("wrong")
    capsys.readouterr()
    assert run("audit", "models:/wrong/1", "--json") == 1
    findings = [f for f in json.loads(capsys.readouterr().out)["findings"] if f["outcome"] == "fail"]
    assert {"registration.coverage", "registration.stale"} <= {f["check"] for f in findings}
    missing = next(f for f in findings if f["check"] == "registration.coverage")
    assert missing["parameter"] == "2.weight"
    assert "2.weight" in missing["message"]
    assert missing["rerun"].startswith("gradaudit audit models:/wrong/1 --tracking-uri sqlite:///")
    assert missing["rerun"].endswith("--check registration.coverage --parameter 2.weight --seed 0")
    assert "audit.outcome" in tags(client, "wrong")
    assert [v.name for v in client.search_model_versions("tags.`audit.outcome` = 'fail'")] == ["wrong"]


@pytest.mark.sampled(cases=1)
@pytest.mark.end_to_end
@pytest.mark.parametrize("narrowing", [["--check", "registration.*"], ["--parameter", "weight"], ["--no-mark"]])
def test_a_narrowed_audit_leaves_no_trace(run, client: MlflowClient, tmp_path: Path, narrowing: list[str]) -> None:  # type: ignore[no-untyped-def]
    register_linear("m")
    assert run("audit", "models:/m/1", *narrowing) == 0
    assert "audit.outcome" not in tags(client, "m")
    assert not (tmp_path / "results").exists()


@pytest.mark.end_to_end
def test_a_directory_is_audited_without_a_registry(run, client: MlflowClient, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    register_linear("m")
    local = mlflow.artifacts.download_artifacts("models:/m/1", dst_path=str(tmp_path / "local"))
    capsys.readouterr()
    assert run("audit", local) == 0
    assert "PASS" in capsys.readouterr().out


@pytest.mark.end_to_end
def test_a_version_without_recipe_is_inconclusive_and_says_how_to_give_it_one(
    run, client: MlflowClient, capsys
) -> None:  # type: ignore[no-untyped-def]
    register_linear("bare", with_recipe=False)
    capsys.readouterr()
    assert run("audit", "models:/bare/1", "--json") == 2
    printed = json.loads(capsys.readouterr().out)
    assert printed["outcome"] == "inconclusive"
    assert "attach_recipe" in printed["findings"][0]["message"]
    assert tags(client, "bare")["audit.outcome"] == "inconclusive"


@pytest.mark.sampled(cases=1)
@pytest.mark.end_to_end
@pytest.mark.parametrize("pickled", [False, True])
def test_a_corrupt_model_is_inconclusive_with_one_sentence(
    run, client: MlflowClient, tmp_path: Path, capsys, pickled
) -> None:  # type: ignore[no-untyped-def]
    register_linear("corrupt", pickled=pickled)
    broken = [path for path in (tmp_path / "artifacts").rglob("*") if path.suffix in (".pth", ".pt2")]
    broken += (tmp_path / "artifacts").rglob("weights.safetensors")
    for path in broken:
        path.write_bytes(path.read_bytes()[:20])
    assert broken
    capsys.readouterr()
    assert run("audit", "models:/corrupt/1") == 2
    said = capsys.readouterr()
    assert "truncated or corrupt" in " ".join(said.out.split())
    assert "Traceback" not in said.out + said.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["models:/nothing/1"], "nothing"),
        (["models:/nothing@best"], "nothing"),
        (["nowhere"], "neither models:/NAME/VERSION"),
        (["models:/x"], "write models:/NAME/VERSION"),
        (["models:/m/1", "--tracking-uri", "http://127.0.0.1:9"], "the server does not answer"),
        (["models:/m/1", "--method", "guess"], "method must be one of auto, probe"),
        (["models:/m/1", "--device", "cuda:7"], "no CUDA device"),
    ],
)
def test_trouble_is_one_sentence_and_exit_2(run, monkeypatch: pytest.MonkeyPatch, capsys, arguments, words) -> None:  # type: ignore[no-untyped-def]
    if "cuda:7" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    register_linear("m")
    capsys.readouterr()
    assert run("audit", *arguments) == 2
    said = capsys.readouterr()
    text = " ".join((said.out + said.err).split())
    assert words in text
    assert "Traceback" not in text


def test_names_cannot_leave_the_rerun_command() -> None:
    version = Version("a b; rm -rf $HOME {x}", 1, "", 0, None, "", {})
    command = rerun_command(version, "sqlite:///m.db").format(options="--check x")
    assert command == "gradaudit audit 'models:/a b; rm -rf $HOME {x}/1' --tracking-uri sqlite:///m.db --check x"


def test_a_results_folder_that_cannot_be_is_said_before_the_audit(run, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    register_linear("m")
    (tmp_path / "file").write_text("")
    capsys.readouterr()
    assert run("audit", "models:/m/1", "--json", "--results", str(tmp_path / "file" / "results")) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "a file stands where a folder must be" in told.err
    assert "--results" in told.err
    assert "repeat" not in told.err


def test_an_error_of_our_own_is_no_failed_model(run, capsys, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    from registry_models.registry import connecting

    def broken(*arguments: object) -> None:
        raise ZeroDivisionError("planted")

    register_linear("m")
    monkeypatch.setattr(connecting, "connect", broken)
    capsys.readouterr()
    assert run("audit", "models:/m/1", "--json") == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "ZeroDivisionError: planted (an error of gradaudit's own; nothing was judged)" in told.err


@pytest.mark.end_to_end
def test_what_libraries_print_is_no_result(run, client: MlflowClient, capsys, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    from registry_models.registry import connecting

    connect = connecting.connect

    def chatty(uri: str) -> MlflowClient:
        print("View run at: http://elsewhere")
        return connect(uri)

    register_linear("m")
    monkeypatch.setattr(connecting, "connect", chatty)
    capsys.readouterr()
    assert run("audit", "models:/m/1", "--json", "--no-mark") == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["outcome"] == "pass"
    assert "View run at" in told.err


def test_the_version_is_printed(run, capsys) -> None:  # type: ignore[no-untyped-def]
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("gradaudit 0.")
