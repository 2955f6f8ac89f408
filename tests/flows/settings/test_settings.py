"""Settings files, the environment and the command line: who wins, what is refused, what is shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from audits.errors import SettingsError
from flows.cli.settings_command import show_settings
from flows.sandbox.levels import _trials, variants_of
from flows.settings.environment import GradauditSettings


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(text: str, name: str = "gradaudit.toml") -> None:
    Path(name).write_text(text, encoding="utf-8")


def test_command_line_over_environment_over_file(monkeypatch: pytest.MonkeyPatch) -> None:
    write('device = "cuda"\nattempts = 5\ntime_limit = 60\naudit = {probes = 3, exact_limit = 10}\n')
    monkeypatch.setenv("GRADAUDIT_DEVICE", "cpu")
    monkeypatch.setenv("GRADAUDIT_ATTEMPTS", "2")
    monkeypatch.setenv("GRADAUDIT_AUDIT__PROBES", "4")
    settings = GradauditSettings.load(attempts=1)
    assert (settings.device, settings.attempts, settings.time_limit) == ("cpu", 1, 60.0)
    assert (settings.audit_settings.probes, settings.audit_settings.exact_limit) == (4, 10), "entries are merged"
    where = {o.name: o.where for o in [*settings.origins(), *settings.audit_origins("m")]}
    assert where["device"] == "GRADAUDIT_DEVICE"
    assert where["attempts"] == "command line"
    assert where["time_limit"] == where["exact_limit"] == "gradaudit.toml"
    assert where["probes"] == "GRADAUDIT_AUDIT__PROBES"
    assert where["experiment"] == "default"


def test_a_model_gets_its_own_thresholds_and_severities_and_nobody_else_does() -> None:
    write(
        'severity = {"update.rule" = "warn"}\n'
        '[[models]]\nmatch = "team-*"\naudit = {detection_limit = 1e-2}\nseverity = {"health.dead-relu" = "fail"}\n'
        '[[models]]\nmatch = "team-a"\nseverity = {"health.dead-relu" = "warn"}\n'
    )
    settings = GradauditSettings.load()
    a, b, other = (settings.for_model(name) for name in ("team-a", "team-b", "other"))
    assert (a.detection_limit, b.detection_limit, other.detection_limit) == (1e-2, 1e-2, 1e-3)
    assert b.severity == {"update.rule": "warn", "health.dead-relu": "fail"}
    assert a.severity["health.dead-relu"] == "warn", "the last that matches wins"
    assert other.severity == {"update.rule": "warn"}
    assert len({settings.digest() for settings in (a, b, other)}) == 3


def test_the_table_in_pyproject_counts_where_there_is_no_file_of_its_own() -> None:
    write('[tool.gradaudit]\nattempts = 7\nwaivers = "w.yaml"\n', "pyproject.toml")
    settings = GradauditSettings.load()
    assert settings.attempts == 7
    assert settings.waivers == str(Path("w.yaml").resolve()), "relative to the file, wherever a worker starts"
    write("attempts = 8\n")
    assert GradauditSettings.load().attempts == 8


def test_a_worker_elsewhere_is_told_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("attempts = 7\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("GRADAUDIT_CONFIG", str(tmp_path / "gradaudit.toml"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert GradauditSettings.load().attempts == 7


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("time_limt = 3", "gradaudit.toml: there is no setting 'time_limt'; did you mean 'time_limit'?"),
        ("time_limit = -3", "gradaudit.toml: time_limit: Input should be greater than 0"),
        ("audit = {probs = 3}", "gradaudit.toml: unknown audit setting 'probs'; did you mean 'probes'?"),
        ('severity = {"update.rul" = "warn"}', "gradaudit.toml: severity of 'update.rul': no check has this name"),
        ('severity = {"update.rule" = "off"}', "'off' is neither 'fail' nor 'warn'"),
        ('[[models]]\nmatch = "a"\naudit = {probes = "many"}', "gradaudit.toml: models 'a': probes: "),
        ("attempts = ", "gradaudit.toml is not TOML"),
    ],
)
def test_what_cannot_be_is_refused_with_its_place(text: str, says: str) -> None:
    write(text)
    with pytest.raises(SettingsError) as raised:
        GradauditSettings.load()
    assert says in str(raised.value)


def test_a_variable_that_is_no_json_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADAUDIT_AUDIT", "{")
    with pytest.raises(SettingsError, match=r"audit.*JSON"):
        GradauditSettings.load()


def test_no_secret_is_ever_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("GRADAUDIT_WEBHOOK_SECRET", "hush-hush")
    monkeypatch.setenv("GRADAUDIT_TRACKING_URI", "postgresql://gradaudit:hush-hush@db/mlflow")
    for as_json in (True, False):
        assert show_settings(GradauditSettings.load(), None, as_json=as_json) == 0
    out = capsys.readouterr().out
    assert "hush-hush" not in out
    assert "postgresql://gradaudit:***@db/mlflow" in out.replace("\n", "")


def test_the_effective_settings_of_a_model_and_its_waivers(capsys: pytest.CaptureFixture[str]) -> None:
    write('waivers = "w.yaml"\n[[models]]\nmatch = "team-*"\naudit = {probes = 5}\n')
    write(
        "waivers:\n  - {model: team-a, check: update.rule, reason: known, owner: anna, expires: 2001-01-01}\n", "w.yaml"
    )
    show_settings(GradauditSettings.load(), "team-a", as_json=True)
    shown = json.loads(capsys.readouterr().out)
    assert shown["audit"]["probes"] == {"value": 5, "from": "gradaudit.toml, models 'team-*'"}
    assert [(w["owner"], w["holds"]) for w in shown["waivers"]] == [("anna", False)]


@pytest.mark.parametrize("level", ["process", "required"])
def test_what_isolation_means_on_this_host_is_shown(
    level: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GRADAUDIT_ISOLATION", level)
    monkeypatch.setattr("flows.sandbox.levels.shutil.which", lambda name: None if level == "required" else name)
    variants_of.cache_clear()
    _trials.cache_clear()
    try:
        show_settings(GradauditSettings.load(), None, as_json=True)
    finally:
        variants_of.cache_clear()
        _trials.cache_clear()
    told = json.loads(capsys.readouterr().out)["isolation"]
    if level == "process":
        assert told["reached"] == "process"
        assert "read the memory of this user's other processes" in told["means"]
    else:
        assert told["reached"] is None
        assert "install bubblewrap" in told["means"]
