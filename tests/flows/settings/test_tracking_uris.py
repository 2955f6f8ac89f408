"""A tracking URI that leads nowhere is one sentence and exit code 2, before anything heavy is imported or begun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from audits.errors import InfrastructureError, SettingsError
from flows.settings.environment import GradauditSettings
from flows.settings.tracking_uris import usable_uri
from registry_models.registry.connecting import connect, shown_uri
from registry_models.registry.versions import list_versions
from tests.stores import register_linear


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("foo://bar", "a scheme that MLflow does not know: write http://HOST:PORT, sqlite:///FILE"),
        ("htp://x", "did you mean 'http'"),
        ("127.0.0.1:5000", "has no scheme: write http://127.0.0.1:5000"),
        ("mlflow.company.example:443/ml", "write http://mlflow.company.example:443/ml"),
        ("sqlite://m.db", "write sqlite:///FILE, with three slashes"),
        ("http://", "names no server"),
        ("file://mlruns", "names a host, not a folder: write file:///"),
        ("../mlflow.db", "is a file: for a database write sqlite:///"),
    ],
)
def test_an_impossible_one_is_refused_with_what_to_write(uri: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match=r".*") as refused:
        usable_uri(uri)
    assert words in str(refused.value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(SettingsError, match="MLFLOW_TRACKING_URI: the tracking URI"):
        GradauditSettings.load()


@pytest.mark.parametrize(
    ("uri", "absolute"),
    [
        ("mlruns", "{}/mlruns"),
        ("./mlruns", "{}/mlruns"),
        ("file:mlruns", "file://{}/mlruns"),
        ("sqlite:///m.db", "sqlite:///{}/m.db"),
        ("sqlite:///../m.db?timeout=5", "sqlite:///{parent}/m.db?timeout=5"),
        ("sqlite:////srv/m.db", "sqlite:////srv/m.db"),
        ("sqlite://", "sqlite://"),
        ("http://h:5000/ml", "http://h:5000/ml"),
        ("postgresql+psycopg2://u:p@h/d", "postgresql+psycopg2://u:p@h/d"),
        ("databricks", "databricks"),
        ("databricks://profile", "databricks://profile"),
    ],
)
def test_a_possible_one_is_made_absolute(
    uri: str, absolute: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert usable_uri(uri) == absolute.format(tmp_path, parent=tmp_path.parent)


@pytest.mark.end_to_end
def test_a_refusal_takes_no_heavy_import(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, sys\n"
        "heavy = ('torch', 'mlflow', 'prefect', 'pandas')\n"
        "atexit.register(lambda: print([n for n in heavy if n in sys.modules], file=sys.stderr))\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    root = Path(__file__).resolve().parents[3]
    for arguments, words in (
        (["audit", "models:/m/1", "--tracking-uri", "foo://bar"], "foo://bar"),
        (["audit", ""], "the target is empty"),
        (["audit", "models:/plain/@nope"], "'models:/plain/@nope' does not name a version"),
        (["audit", "models:/m/1", "--nonsense"], "No such option"),
        (["nightly", "--tracking-uri", "127.0.0.1:5000"], "write http://127.0.0.1:5000"),
    ):
        ended = subprocess.run(
            [sys.executable, "-m", "flows.cli", *arguments],
            cwd=root, env=environment, text=True, capture_output=True, check=False,
        )  # fmt: skip
        assert ended.returncode == 2, ended.stderr
        assert ended.stdout == ""
        assert words in ended.stderr
        assert ended.stderr.rstrip().endswith("[]"), ended.stderr


def test_a_database_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"there is no database .*typo\.db, so nothing is registered in it"):
        connect(f"sqlite:///{tmp_path}/typo.db")
    assert list(tmp_path.iterdir()) == []


def test_a_database_server_is_tried_once() -> None:
    with pytest.raises(InfrastructureError, match=r"postgresql://u@127\.0\.0\.1:9/d does not answer") as refused:
        connect("postgresql://u:secret@127.0.0.1:9/d")
    assert "secret" not in str(refused.value)
    assert shown_uri("http://u:p@h/x") == "http://u@h/x"


def test_a_file_store_works_or_says_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.chdir(tmp_path)
    uri = usable_uri("./mlruns")
    with pytest.raises(SettingsError, match=r"MLflow no longer opens the file store .*MLFLOW_ALLOW_FILE_STORE=true"):
        connect(uri)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(uri)
    try:
        register_linear("in a folder")
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        client: MlflowClient = connect(uri)
        assert [version.label for version in list_versions(client)] == ["in a folder v1"]
    finally:
        mlflow.set_tracking_uri(None)
