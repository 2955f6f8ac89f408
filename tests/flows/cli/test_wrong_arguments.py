"""Every command with every argument wrong: one sentence that names the cure, exit code 2, nothing done and no mark."""

from __future__ import annotations

import inspect
import re
import shlex
import shutil
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import mlflow
import pytest
from mlflow.tracking import MlflowClient
from torch import nn

from flows.cli import main as cli
from registry_models.recipes.recipe_files import write_recipe
from registry_models.registry.versions import VersionReference
from tests.flows.cli.test_audit_command import gradaudit
from tests.registry_models.attestation.keys import make_keys
from tests.stores import copy_store, linear_recipe, register_linear

NO_PREFECT = "PREFECT_API_URL: no Prefect server is configured"

#: command -> argument -> cases: what is written, and what the sentence must say. Flags cannot be wrong.
CASES: dict[str, dict[str, list[tuple[str, str]]]] = {
    "audit": {
        "target": [
            ("models:/tiny/@prod", "did you mean 'models:/tiny@prod'"),
            ("models:/tiny/v1", "did you mean 'models:/tiny/1'"),
            ("models:/tiny@prood", "alias prood not found; it has versions 1, @prod"),
            ("models:/tinny/1", "not found; did you mean 'tiny'"),
            ("models:/tiny/99", "not found; it has versions 1"),
            ("tiny", "write models:/tiny/VERSION"),
            ("empty", "is not an MLflow model directory"),
            ("''", "the target is empty"),
        ],
        "recipe": [
            ("models:/tiny/1 --recipe recipes/emty", "does not exist; did you mean 'empty'"),
            ("models:/tiny/1 --recipe empty", "holds no recipe.yaml"),
            ("models:/tiny/1 --recipe recipes", "holds no recipe.yaml; did you mean 'recipes/audit'"),
            ("models:/tiny/1 --recipe recipes/audit/recipe.yaml", "give the folder that holds recipe"),
            ("models:/tiny/1 --recipe broken", "the recipe in broken: .*unknown key 'los'"),
        ],
        "device": [
            ("models:/tiny/1 --device gpu", "device 'gpu' is unknown .*; did you mean 'cuda'"),
            ("models:/tiny/1 --device cuda:99", "device 'cuda:99' was asked for and torch finds"),
        ],
        "junit": [
            ("models:/tiny/1 --junit nofolder/x.xml", "--junit nofolder/x.xml: there is no folder"),
        ],
        "html": [
            ("models:/tiny/1 --html empty", "--html empty: that is a folder; name a file in it"),
        ],
        "seed": [
            ("models:/tiny/1 --seed abc", "Invalid value for '--seed'"),
            ("models:/tiny/1 --seed 999999999999999999999999", "seed must lie between"),
        ],
        "check": [
            ("models:/tiny/1 --check gradient.finte-difference", "did you mean 'gradient.finite-"),
        ],
        "method": [
            ("models:/tiny/1 --method prob", "method must be one of .*, not 'prob'; did you mean 'probe'"),
        ],
        "fail_on": [
            ("models:/tiny/1 --fail-on warn", "Invalid value for '--fail-on': .*'warn' is not one of 'newly-failed'"),
        ],
        "tracking_uri": [
            ("models:/tiny/1 --tracking-uri sqlite:///typo.db", "there is no database .*typo.db"),
            ("models:/tiny/1 --tracking-uri htp://host", "scheme that MLflow does not know; did you"),
        ],
        "results": [
            ("models:/tiny/1 --results file.txt", "a file stands where a folder must be"),
        ],
    },
    "nightly": {
        "models": [
            ("--models tinny", "no registered model matches 'tinny'; did you mean 'tiny'"),
        ],
        "fail_on": [
            ("--fail-on warn", "Invalid value for '--fail-on': .*'warn' is not one of 'newly-failed', 'fail', 'inc"),
            ("--exit-zero --models tinny", "no registered model matches 'tinny'"),
        ],
        "tracking_uri": [
            ("--tracking-uri sqlite:///typo.db", "there is no database"),
        ],
        "results": [
            ("--results file.txt", "a file stands where a folder must be"),
        ],
    },
    "gate": {
        "target": [
            ("models:/tiny@prood", "alias prood not found; it has versions 1, @prod"),
            ("tiny", "write models:/NAME/VERSION or models:/NAME@ALIAS"),
        ],
        "max_age": [("models:/tiny/1 --max-age soon", "--max-age soon: write a number with its unit")],
        "timeout": [("models:/tiny/1 --timeout -1", "Invalid value for '--timeout'")],
        "device": [("models:/tiny/1 --device gpu", "device 'gpu' is unknown .*; did you mean 'cuda'")],
        "key": [
            ("models:/tiny/1 --require-attestation --key nosuch.pem", "nosuch.pem cannot be read: No such file"),
            ("models:/tiny/1 --require-attestation --key file.txt", "file.txt holds no public key of a known kind"),
        ],
        "tracking_uri": [("models:/tiny/1 --tracking-uri nosuch://x", "scheme that MLflow does not know")],
        "results": [
            ("models:/tiny/1 --results file.txt", "a file stands where a folder must be"),
            ("models:/tiny/1 --no-audit --results file.txt", "a file stands where a folder must be"),
        ],
    },
    "check": {
        "target": [
            ("nosuch.py", "'nosuch.py' does not name a Python file: write path/to/file.py"),
            ("empty", "'empty' does not name a Python file"),
            ("file.txt", "'file.txt' does not name a Python file"),
            ("models.py:nothing", "models.py has no function 'nothing'"),
        ],
        "device": [("models.py --device gpu", "device 'gpu' is unknown .*; did you mean 'cuda'")],
        "gitlab": [
            ("models.py --gitlab nofolder/x.json", "--gitlab nofolder/x.json: there is no folder"),
            ("models.py --gitlab empty", "--gitlab empty: that is a folder; name a file in it"),
        ],
    },
    "attest": {
        "target": [("models:/tiny@prood --key gate.pem", "alias prood not found; it has versions 1, @prod")],
        "key": [
            ("models:/tiny/1 --key nosuch.pem", "nosuch.pem cannot be read: No such file"),
            ("models:/tiny/1 --key file.txt", "file.txt holds no private key of a known kind"),
            ("models:/tiny/1 --key gate.pem", "has no audit as it is now and in this environment: .gradaudit gate"),
        ],
        "expires": [("models:/tiny/1 --key gate.pem --expires soon", "--expires soon: write a number with its unit")],
        "out": [("models:/tiny/1 --key gate.pem --out nofolder/x", "--out nofolder/x: there is no folder")],
        "results": [("models:/tiny/1 --key gate.pem --results file.txt", "a file stands where a folder must be")],
        "tracking_uri": [
            ("models:/tiny/1 --key gate.pem --tracking-uri nosuch://x", "scheme that MLflow does not know"),
        ],
    },
    "verify": {
        "target": [
            ("nosuch --key gate.pub", "'nosuch' is neither models:/NAME/VERSION, models:/NAME@ALIAS nor a model"),
            ("models:/tiny/99 --key gate.pub", "not found; it has versions 1"),
        ],
        "key": [
            ("models:/tiny/1 --key nosuch.pem", "nosuch.pem cannot be read: No such file"),
            ("models:/tiny/1 --key file.txt", "file.txt holds no public key of a known kind"),
        ],
        "envelope": [("models:/tiny/1 --key gate.pub --envelope nosuch", "nosuch cannot be read: No such file")],
        "max_age": [("models:/tiny/1 --key gate.pub --max-age soon", "--max-age soon: write a number with its unit")],
        "tracking_uri": [
            ("models:/tiny/1 --key gate.pub --tracking-uri nosuch://x", "scheme that MLflow does not know"),
        ],
    },
    "setup": {
        "cron": [
            ("--cron often", NO_PREFECT),
        ],
        "timezone": [
            ("--timezone Mars", NO_PREFECT),
        ],
        "notify": [
            ("--notify nobody", NO_PREFECT),
        ],
        "file": [
            ("--file nothere.yaml", NO_PREFECT),
        ],
        "pool_type": [
            ("--pool-type none", NO_PREFECT),
        ],
    },
    "webhook": {
        "host": [
            ("--host 300.1.1.1 --insecure", NO_PREFECT),
        ],
        "port": [
            ("--port 99999", "Invalid value for '--port'"),
        ],
        "public_url": [
            ("--public-url nonsense --insecure", NO_PREFECT),
        ],
        "interval": [
            ("--interval 0", "Invalid value for '--interval'"),
        ],
        "since_hours": [
            ("--since-hours -1", "Invalid value for '--since-hours'"),
        ],
        "tracking_uri": [
            ("--tracking-uri htp://x", "scheme that MLflow does not know"),
        ],
        "results": [
            ("--results file.txt --insecure", NO_PREFECT),
        ],
    },
    "watch": {
        "interval": [
            ("--interval often", "Invalid value for '--interval'"),
        ],
        "since_hours": [
            ("--since-hours -1", "Invalid value for '--since-hours'"),
        ],
        "tracking_uri": [
            ("--tracking-uri htp://x", "scheme that MLflow does not know"),
        ],
        "results": [
            ("--results file.txt", NO_PREFECT),
        ],
    },
    "up": {
        "folder": [
            ("--folder file.txt", "--folder file.txt: that is a file; name a folder"),
        ],
        "mlflow_port": [
            ("--mlflow-port 99999", "Invalid value for '--mlflow-port'"),
        ],
        "prefect_port": [
            ("--prefect-port -1", "Invalid value for '--prefect-port'"),
        ],
        "webhook_port": [
            ("--webhook-port x", "Invalid value for '--webhook-port'"),
        ],
        "gpus": [
            ("--gpus 99", "--gpus: '99' is not there"),
        ],
    },
    "demo": {
        "folder": [
            ("--folder file.txt", "--folder file.txt: that is a file; name a folder"),
        ],
    },
    "explain": {
        "check": [
            ("gradient.finit", "did you mean 'gradient.finite-difference'"),
            ("nosuch", "there is no check 'nosuch' "),
        ],
    },
    "report": {
        "target": [
            ("models:/tiny/1", "there is no audit in results yet"),
            ("nonsense", "is neither models:/NAME/VERSION"),
            ("models:/tiny@prood", "alias prood not found"),
        ],
        "junit": [
            ("models:/tiny/1 --junit nofolder/x.xml", "there is no folder"),
        ],
        "html": [
            ("models:/tiny/1 --html nofolder/x.html", "there is no folder"),
        ],
        "tracking_uri": [
            ("models:/tiny@prod --tracking-uri sqlite:///typo.db", "there is no database"),
        ],
        "results": [
            ("models:/tiny/1 --results nosuch", "there is no audit in nosuch yet"),
        ],
    },
    "history": {
        "model": [
            ("tinny", "there is no audit in results yet"),
        ],
        "parameter": [
            ("tiny --parameter nosuch", "there is no audit in results yet"),
        ],
        "check": [
            ("tiny --check nosuch", "there is no audit in results yet"),
        ],
        "since": [
            ("tiny --since 2026-13-01", "Invalid value for '--since'"),
        ],
        "results": [
            ("tiny --results nosuch", "there is no audit in nosuch yet"),
        ],
    },
    "diff": {
        "before": [
            ("nonsense models:/tiny/1", "is neither models:/NAME/VERSION"),
        ],
        "now": [
            ("models:/tiny/1 nonsense", "there is no audit in results yet|is neither"),
        ],
        "tracking_uri": [
            ("models:/tiny@prod x --tracking-uri sqlite:///typo.db", "there is no database"),
        ],
        "results": [
            ("models:/tiny/1 models:/tiny/1 --results nosuch", "no audit in nosuch yet"),
        ],
    },
    "sql": {
        "query": [
            ("'select check from rows'", "is a word of SQL: write the column in double quotes"),
        ],
        "since": [
            ("'select 1' --since yesterday", "Invalid value for '--since'"),
        ],
        "results": [
            ("'select 1' --results emty", "there is no results folder emty; did you mean 'empty'"),
        ],
    },
    "compact": {
        "month": [
            ("--month 2026-13 --results empty", "'2026-13' is not a month"),
        ],
        "results": [
            ("--results emty", "there is no results folder emty; did you mean 'empty'"),
        ],
    },
    "attach": {
        "version": [
            ("models:/tiny/v1 recipes/audit", "did you mean 'models:/tiny/1'"),
            ("models:/tinny/1 recipes/audit", "did you mean 'tiny'"),
        ],
        "recipe": [
            ("models:/tiny/1 nothere", "does not exist"),
            ("models:/tiny/1 empty", "holds no recipe.yaml"),
        ],
        "tracking_uri": [
            ("models:/tiny/1 recipes/audit --tracking-uri htp://x", "scheme that MLflow"),
        ],
    },
}

#: Arguments that are right whatever they say, or whose case needs a model: the tests below have them.
ELSEWHERE = {("audit", "parameter"), ("settings", "model")}

#: Variables that are wrong, whatever the command.
VARIABLES = [
    ({"GRADAUDIT_WAVERS": "x"}, "there is no setting GRADAUDIT_WAVERS; did you mean 'GRADAUDIT_WAIVERS'"),
    ({"GRADAUDIT_WAIVERS": "nosuch.yaml"}, "the waivers file nosuch.yaml"),
    ({"GRADAUDIT_RECIPES": "nosuch"}, "GRADAUDIT_RECIPES: the recipe repository nosuch is not a folder"),
    ({"GRADAUDIT_AUDIT__SEDE": "3"}, "unknown audit setting 'sede'; did you mean 'seed'"),
    ({"GRADAUDIT_DEVICE": "gpu"}, "device 'gpu' is unknown"),
    ({"GRADAUDIT_ISOLATION": "none"}, "GRADAUDIT_ISOLATION"),
    ({"GRADAUDIT_TIME_LIMIT": "-3"}, "GRADAUDIT_TIME_LIMIT"),
    ({"MLFLOW_TRACKING_URI": "sqlite:///typo.db"}, "there is no database .*typo.db"),
    ({"MLFLOW_TRACKING_URI": "127.0.0.1:5000"}, "has no scheme: write http://127.0.0.1:5000"),
]


@pytest.fixture(scope="module")
def prepared(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one version and an alias, a recipe, a broken one, an empty folder, a file."""
    folder = tmp_path_factory.mktemp("prepared")
    uri = copy_store(empty_store, folder)
    mlflow.set_tracking_uri(uri)
    register_linear("tiny")
    MlflowClient(tracking_uri=uri).set_registered_model_alias("tiny", "prod", 1)
    mlflow.set_tracking_uri(None)
    write_recipe(linear_recipe(nn.Linear(2, 1)), folder / "recipes")
    shutil.copytree(folder / "recipes" / "audit", folder / "broken")
    broken = folder / "broken" / "recipe.yaml"
    broken.write_text(broken.read_text() + "los: mse_loss\n")
    (folder / "empty").mkdir()
    (folder / "recipes" / "empty").mkdir()
    (folder / "file.txt").write_text("")
    (folder / "models.py").write_text("def audit_one():\n    raise RuntimeError\n")
    make_keys(folder)
    return folder


def _files(folder: Path) -> list[Path]:
    """What lies in a folder, but for what Python may write beside a file that it imports."""
    found = (path.relative_to(folder) for path in folder.rglob("*"))
    return sorted(path for path in found if "__pycache__" not in path.parts)


def refused(
    arguments: list[str], sentence: str, prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, **env: str
) -> None:
    """Run the command; hold it to exit code 2, one sentence, and to have changed nothing."""
    uri = f"sqlite:///{prepared / 'mlflow.db'}"
    for name, value in {"MLFLOW_TRACKING_URI": uri, "COLUMNS": "200", **env}.items():
        monkeypatch.setenv(name, value)
    before = _files(prepared)
    capsys.readouterr()
    assert gradaudit(*arguments, monkeypatch=monkeypatch, tmp_path=prepared) == 2
    out, err = capsys.readouterr()
    assert out == ""
    told = [line for line in err.splitlines() if not line.startswith("looking ")]
    assert re.search(sentence, err), err
    assert "Traceback" not in err
    assert "error of gradaudit's own" not in err
    assert len(told) <= 6, err  # DuckDB points into the query with three
    assert _files(prepared) == before
    version = VersionReference("tiny", 1).resolve(MlflowClient(tracking_uri=uri))
    assert "audit.outcome" not in version.tags


ALL = [
    ([command, *shlex.split(text)], said)
    for command, arguments in CASES.items()
    for cases in arguments.values()
    for text, said in cases
]


@pytest.mark.parametrize(("arguments", "sentence"), ALL, ids=[" ".join(words)[:60] for words, _ in ALL])
def test_a_wrong_argument_is_one_sentence(
    arguments: list[str], sentence: str, prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    refused(arguments, sentence, prepared, monkeypatch, capsys)


@pytest.mark.parametrize(("variables", "sentence"), VARIABLES, ids=[next(iter(v)) for v, _ in VARIABLES])
@pytest.mark.parametrize("command", [["audit", "models:/tiny/1"], ["nightly"]], ids=["audit", "nightly"])
def test_a_wrong_variable_is_one_sentence(
    command: list[str], variables: dict[str, str], sentence: str, prepared: Path, monkeypatch: Any, capsys: Any
) -> None:
    refused(command, sentence, prepared, monkeypatch, capsys, **variables)


def test_every_argument_of_every_command_has_a_case() -> None:
    wanted = {
        (command.callback.__name__, name)
        for command in cli.app.registered_commands
        if command.callback is not None
        for name, kind in get_type_hints(inspect.unwrap(command.callback), include_extras=True).items()
        if name != "return" and kind is not Annotated[bool, ...] and getattr(kind, "__origin__", kind) is not bool
    }
    assert wanted - {(c, a) for c, arguments in CASES.items() for a in arguments} == ELSEWHERE


@pytest.mark.end_to_end
def test_a_parameter_that_the_model_lacks_is_refused_with_the_nearest(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    register_linear("tiny")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)
    code = gradaudit("audit", "models:/tiny/1", "--parameter", "wieght", monkeypatch=monkeypatch, tmp_path=tmp_path)
    assert code == 2
    out = " ".join(capsys.readouterr().out.split())
    assert "--parameter 'wieght' matches no parameter of the model; did you mean 'weight'?" in out
    assert "audit.outcome" not in VersionReference("tiny", 1).resolve(client).tags
