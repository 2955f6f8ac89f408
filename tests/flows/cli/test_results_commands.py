"""``report``, ``history``, ``diff``, ``sql``, ``compact``, ``attach``: what they print, their exit codes, and names."""

from __future__ import annotations

import csv
import datetime
import io
import json
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow.tracking import MlflowClient
from torch import nn

from audits import Recipe
from audits.results.store import ResultsStore
from flows.cli import main as cli
from registry_models import log_model
from registry_models.recipes.recipe_files import write_recipe
from registry_models.registry.versions import RECIPE_TAG, VersionReference
from tests.audits.results.committing import DAY, PARTS, commit, report, row
from tests.stores import BATCH, linear_recipe, register_linear

Run = Callable[..., int]

#: A name no terminal, page, shell or spreadsheet may act on.
HOSTILE = "=cmd()\x1b[31m<script>alert(1)</script>\u202e`rm -rf ~`"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    def gradaudit(*arguments: str) -> int:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["gradaudit", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert isinstance(ended.value.code, int)
        return ended.value.code

    return gradaudit


@pytest.fixture
def store(tmp_path: Path) -> ResultsStore:
    """Version 1 passes, version 2 fails since its second night; its optimizer is another one."""
    made = ResultsStore(tmp_path / "results")
    commit(made, report(row("pass", error=0.1, threshold=4.0), row("pass", "v")))
    for night, outcome in enumerate(("pass", "fail")):
        rows = (row(outcome, error=3.0, threshold=4.0, seed=0), row("pass", "v"))
        day = DAY + datetime.timedelta(1 + night)
        commit(made, report(*rows, version=2, day=day, parts={**PARTS, "optimizer": "2", "weights": "2"}))
    return made


def said(capsys: pytest.CaptureFixture[str]) -> str:
    both = capsys.readouterr()
    return " ".join((both.out + both.err).split())


@pytest.mark.end_to_end
def test_an_audit_is_shown_again_as_it_was(
    run: Run, client: MlflowClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Two real versions: the second's optimizer was built before its head was replaced."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)
    mlflow.set_experiment("models")
    for lost in (False, True):
        model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        if lost:
            model[2] = nn.Linear(4, 1)
            optimizer = torch.optim.SGD(optimizer.param_groups[0]["params"], lr=1e-3)
        log_model(model, "net", recipe=Recipe.capture(model, batch=BATCH, loss="mse_loss", optimizer=optimizer))
    capsys.readouterr()
    codes = [run("audit", f"models:/net/{version}", "--json") for version in (1, 2)]
    decoder, text, audited = json.JSONDecoder(), capsys.readouterr().out.strip(), []
    while text:
        printed, end = decoder.raw_decode(text)
        audited.append(printed)
        text = text[end:].strip()
    assert codes[1] == 1

    client.set_registered_model_alias("net", "newest", "2")
    targets = ("models:/net/2", "models:/net@newest", audited[1]["audit_id"][:10])
    for target in targets:
        assert run("report", target, "--json", "--junit", "junit.xml", "--html", "report.html") == 1
        assert json.loads(capsys.readouterr().out) == audited[1]
    suite = ET.parse(tmp_path / "junit.xml").getroot()[0]
    assert int(suite.attrib["failures"]) == audited[1]["counts"]["fail"]
    page = (tmp_path / "report.html").read_text()
    assert "Held against v1" in page
    assert run("report", "models:/net/1") == codes[0]
    assert "net v1, audited" in said(capsys)

    assert run("diff", "models:/net/1", "models:/net/2", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    new = {d["check"]: d["cause"] for d in found["differences"] if d["change"] == "new"}
    assert new["registration.coverage"].startswith("recipe (optimizer")
    assert "weights" in found["causes"]

    published = client.get_run(audited[1]["run_id"])
    note = published.data.tags["mlflow.note.content"]
    assert "**Since v1, audited" in note
    assert "**new** registration.coverage 2.weight and 1 more" in note
    html = Path(mlflow.artifacts.download_artifacts(run_id=audited[1]["run_id"], dst_path=str(tmp_path / "run")))
    assert "Held against v1" in (html / "report.html").read_text()


def test_history_says_since_when(run: Run, store: ResultsStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("history", "m") == 0
    words = said(capsys)
    assert "w fails update.rule since v2, 2026-02-02 02:00 UTC; last right in v2, 2026-02-01 02:00 UTC." in words
    assert "Every other claim of m held in every audit that judged it (1 parameter, 3 audits)" in words
    assert run("history", "m", "--parameter", "[w]", "--since", "2026-02-01", "--json") == 0
    moments = json.loads(capsys.readouterr().out)
    assert [(m["version"], m["outcome"], m["error"]) for m in moments] == [(2, "pass", 3.0), (2, "fail", 3.0)]
    assert run("history", "m", "--check", "update.*", "--csv") == 0
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [line["parameter"] for line in lines] == ["w", "v"] * 3


def test_diff_names_the_cause_in_a_line(run: Run, store: ResultsStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("diff", "models:/m/1", "models:/m/2") == 1
    words = said(capsys)
    assert "differs: weights, recipe (optimizer)" in words
    assert "new update.rule ✓ pass → ✗ fail" in words
    assert "recipe (optimizer);" in words
    whole = (row("pass", check=check) for check in ("registration.coverage", "gradient.finite-difference"))
    commit(store, report(row("pass"), *whole, version=4))
    assert run("diff", "models:/m/2", "models:/m/4") == 0
    assert "1 fixed" in said(capsys)
    commit(store, report(row("inconclusive", None, check="audit.completed"), version=3))
    assert run("diff", "models:/m/2", "models:/m/3") == 2
    assert "2 unjudged" in said(capsys)


def test_sql_prints_a_table_csv_and_json(run: Run, store: ResultsStore, capsys: pytest.CaptureFixture[str]) -> None:
    asked = "SELECT model_version AS v, 'nan'::DOUBLE AS x, audited_at, parts FROM audits WHERE v = 1"
    assert run("sql", asked, "--json") == 0
    (line,) = json.loads(capsys.readouterr().out)
    assert (line["v"], line["x"], line["audited_at"]) == (1, None, "2026-01-31T02:00:00+00:00")
    assert line["parts"] == PARTS
    assert run("sql", "SELECT 1 AS a, 2 AS a", "--csv") == 0
    assert capsys.readouterr().out == "a,a_2\n1,2\n"
    assert run("sql", "FROM failures") == 0
    assert "update.rule" in said(capsys)
    assert run("sql", "SELECT count(*) AS n FROM audits", "--since", "2026-02-01", "--csv") == 0
    assert said(capsys) == "n 2"
    assert run("sql", "FROM failures WHERE false") == 0
    assert "no rows; columns: audit_id, audited_at" in said(capsys)


def test_sql_reads_stdin(run: Run, store: ResultsStore, monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(sys, "stdin", io.StringIO("SELECT count(*) AS n FROM audits"))
    assert run("sql", "-", "--csv") == 0
    assert capsys.readouterr().out == "n\n3\n"


def test_compact_merges_past_days_and_ended_months(
    run: Run, store: ResultsStore, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("compact", "--month", "2026-01", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"merged": 2, "months": ["2026-01"], "files": 6}
    assert run("compact") == 0
    assert "4 files merged, 4 in the store now." in said(capsys)
    assert run("compact") == 0
    assert "Nothing to merge before today: 4 files" in said(capsys)
    assert run("history", "m", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)) == 6


def test_a_registered_version_is_given_a_recipe(
    run: Run, client: MlflowClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)
    register_linear("bare", with_recipe=False)
    folder = write_recipe(linear_recipe(nn.Linear(2, 1)), tmp_path)
    (folder / "notes.txt").write_text("not part of a recipe")
    assert run("attach", "models:/bare/1", str(folder)) == 0
    uri = VersionReference("bare", 1).resolve(client).tags[RECIPE_TAG]
    assert uri in said(capsys)
    got = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(tmp_path / "got")))
    assert sorted(path.name for path in got.iterdir()) == ["batch.safetensors", "recipe.yaml"]
    for target, place, words in (
        ("models:/bare/1", str(tmp_path / "nowhere"), "does not exist"),
        ("models:/bare/1", str(folder / "recipe.yaml"), "give the folder that holds recipe.yaml"),
        ("models:/bare/1", str(tmp_path), "holds no recipe.yaml; did you mean"),
        ("models:/bare/7", str(folder), "bare"),
    ):
        assert run("attach", target, place) == 2
        assert words in said(capsys)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["report", "models:/m/1"], "there is no audit in"),
        (["history", "m"], "there is no audit in"),
        (["diff", "models:/m/1", "models:/m/2"], "there is no audit in"),
        (["report", "nowhere"], "neither models:/NAME/VERSION"),
        (["sql", "SELECT nothing FROM rows"], 'Referenced column "nothing" not found'),
        (["sql", "DROP VIEW rows"], "write one statement that reads"),
        (["compact", "--month", "October"], "write it as 2026-10"),
        (["report", "models:/m/1", "--results", "s4://bucket"], "cannot be opened"),
    ],
)
def test_trouble_on_an_empty_store_is_one_text_and_exit_2(  # type: ignore[no-untyped-def]
    run: Run, capsys, arguments: list[str], words: str
) -> None:
    assert run(*arguments) == 2
    text = said(capsys)
    assert words in text
    assert "Traceback" not in text


def test_unknown_names_get_the_nearest(run: Run, store: ResultsStore, capsys: pytest.CaptureFixture[str]) -> None:
    commit(store, report(row("pass"), model="char-gpt"))
    assert run("history", "chr-gpt") == 2
    assert "did you mean 'char-gpt'?" in said(capsys)
    assert run("report", "models:/char-gpt/4") == 2
    assert "of this model it has v1" in said(capsys)
    assert run("history", "m", "--parameter", "x*") == 2
    assert "3 audits of m are stored" in said(capsys)


def test_names_from_models_act_on_nothing(
    run: Run, store: ResultsStore, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    commit(store, report(row("fail", HOSTILE, message=HOSTILE), model=HOSTILE.replace("/", "|"), version=1))
    name = HOSTILE.replace("/", "|")
    for arguments in (["history", name], ["report", f"models:/{name}/1"], ["sql", "FROM failures"],
                      ["diff", "models:/m/1", f"models:/{name}/1"]):  # fmt: skip
        run(*arguments)
        shown = capsys.readouterr().out
        assert "=cmd()" in shown
        assert "\x1b[31m<" not in shown
        assert "\u202e" not in shown
    run("sql", "SELECT parameter FROM failures WHERE parameter LIKE '=cmd%'", "--csv")
    cells = list(csv.reader(io.StringIO(capsys.readouterr().out)))[1]
    assert cells[0].startswith("'=cmd()")
    assert "\x1b" not in cells[0]
    run("report", f"models:/{name}/1", "--html", "r.html", "--json")
    page = (tmp_path / "r.html").read_text()
    assert "<script>alert(1)" not in page
    assert "\x1b" not in page


def test_checks_are_explained_as_json_too(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("explain", "update.rule", "--json") == 0
    assert json.loads(capsys.readouterr().out)["name"] == "update.rule"
    assert run("explain", "update.rul") == 2
    assert "did you mean 'update.rule'?" in said(capsys)


@pytest.mark.end_to_end
def test_the_command_line_starts_without_the_heavy_libraries() -> None:
    import subprocess

    heavy = ("torch", "mlflow", "prefect", "duckdb", "pandas")
    code = f"import sys, flows.cli.main; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
