"""What a terminal shows at 80, 120 and 200 columns: names whole, no character lost, no line too long."""

from __future__ import annotations

import dataclasses
import datetime
import inspect
import io
import re
from pathlib import Path
from typing import Any, get_type_hints

import pyarrow as pa
import pytest
from rich.cells import cell_len
from rich.console import Console

from audits.checks import CHECKS
from audits.history.comparison import compare
from audits.history.parameter_history import HistoryEntry, ParameterHistory
from audits.naming import visible
from audits.outcomes import Coverage, Outcome, ResultRow, Severity
from audits.report import AuditReport
from audits.results.format import AuditIdentity
from audits.settings import AuditSettings
from audits.signs import SIGNS
from flows.choosing.audit_summary import AuditSummary
from flows.cli import checks_command, diff_command, display, history_command, sql_command
from flows.cli import main as cli
from tests.flows.cli.test_audit_command import gradaudit

LONGEST = sorted(CHECKS, key=len)[-4:]
MESSAGE = "blocks.11.attention.projection.weight received another gradient than the declared loss's: the end of it"
ADVICE = "Accumulation, loss scaling, clipping, zero_grad and detach in the step function."
PARAMETER = "blocks.11.attention.projection.weight"


@pytest.fixture(params=[80, 120, 200])
def screen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Console:
    console = Console(file=io.StringIO(), width=request.param)
    for module in (display, history_command, diff_command, sql_command):
        monkeypatch.setattr(module, "console", console)
    return console


def lines(screen: Console, view: Any = None) -> list[str]:
    """What was printed, none of it wider than the terminal."""
    if view is not None:
        screen.print(view)
    found = screen.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, found)) <= screen.width
    return found


def has_names(found: list[str], names: list[str]) -> None:
    for name in names:
        assert any(re.search(rf"(^|\s){re.escape(name)}(\s|$)", line) for line in found), (name, found)


def has_words(found: list[str], text: str) -> None:
    """Every word is there, whole."""
    shown = " ".join(found).split()
    assert [word for word in text.split() if word not in shown] == []


def report(outcome: Outcome = Outcome.FAIL) -> AuditReport:
    rows = [
        ResultRow(
            check=check, outcome=outcome, severity=Severity.FAIL, phase="step", parameter=PARAMETER, message=MESSAGE,
            where_to_look=ADVICE,
        )
        for check in LONGEST
    ]  # fmt: skip
    identity = AuditIdentity(
        audit_id="a" * 24, model_name="a-model", model_version=3, audited_at=datetime.datetime.now(datetime.UTC)
    )
    return AuditReport(tuple(rows), Coverage(1.0, 1.0, ()), identity)


def test_a_report(screen: Console) -> None:
    found = lines(screen, display.report_view(report()))
    has_names(found, LONGEST)
    has_words(found, f"{MESSAGE} {ADVICE}")


def test_findings_that_read_the_same_are_told_once(screen: Console) -> None:
    one = report().rows[0]
    rows = tuple(dataclasses.replace(one, parameter=f"layer.{i}.bias") for i in range(7))
    found = lines(screen, display.report_view(dataclasses.replace(report(), rows=rows)))
    has_names(found, [one.check, "layer.0.bias", "layer.2.bias"])
    text = " ".join(found)
    assert "and 4 more" in text
    assert text.count("Accumulation,") == 1


def test_history(screen: Console) -> None:
    at = datetime.datetime(2026, 11, 27, tzinfo=datetime.UTC)
    told = []
    for check in LONGEST:
        entry = HistoryEntry(
            audit_id="a" * 24, audited_at=at, version=117, parameter="blocks.11.scale", outcome=Outcome.INCONCLUSIVE,
            check=check, checks=1, message=MESSAGE, run_id=None, error=1.2345e-10, threshold=1.2345e-12,
            detection_limit=1e-6,
        )  # fmt: skip
        told.append(ParameterHistory("blocks.11.scale", (entry,)))
    found = lines(screen, history_command.history_view("a-model", told, every=True))
    has_names(found, [*LONGEST, "blocks.11.scale", "117"])


def test_history_counts_one_as_one(screen: Console) -> None:
    at = datetime.datetime(2026, 11, 27, tzinfo=datetime.UTC)
    entry = HistoryEntry(
        audit_id="a" * 24, audited_at=at, version=1, parameter="w", outcome=Outcome.PASS, check=LONGEST[0],
        checks=1, message="", run_id=None, error=None, threshold=None, detection_limit=None,
    )  # fmt: skip
    found = lines(screen, history_command.history_view("a-model", [ParameterHistory("w", (entry,))], every=False))
    assert "(1 parameter, 1 audit)" in " ".join(" ".join(found).split())


def test_diff(screen: Console) -> None:
    found = lines(screen, diff_command.diff_view(compare(report(Outcome.PASS), report(Outcome.FAIL))))
    has_names(found, [*LONGEST, PARAMETER])
    assert not any(line.rstrip().endswith(("cod", "recip", "weigh")) for line in found)


def test_verdicts(screen: Console) -> None:
    long_name = "a-model-with-a-name-that-no-terminal-has-room-for-" * 4
    summaries = [
        AuditSummary(
            model=name, version=3, outcome=outcome, coverage=1.0, failed_checks=[LONGEST[0]],
            failed_parameters=[PARAMETER, "b"], why=why, run_id=None, seconds=1.0, headline="", unjudged="",
        )
        for name, outcome, why in (
            ("a-model", "fail", f"ScaledGelu's backward is wrong: 8 parameters, from w ({LONGEST[0]})"),
            (long_name, "inconclusive", "no recipe says how it is trained"),
        )
    ]  # fmt: skip
    found = lines(screen, display.verdicts_table(summaries, "title"))
    has_names(found, ["inconclusive"])
    assert any(f"({LONGEST[0]})" in line for line in found), "the check in one piece"
    has_words(found, "ScaledGelu's backward is wrong: 8 parameters, from w")
    has_words(found, "no recipe says how it is trained")


NAMES = [
    "m",
    "a-model-with-a-name-that-no-terminal-has-room-for-" * 5,
    "モデル" * 40,
    "a\nb" * 50,
    "[bold]" * 30,
    "📈 " * 90,
]

CURED = (
    "this version has no recipe and no input example, so nobody knows what to feed it: register it with "
    "registry_models.log_model(model, 'm', recipe=Recipe.capture(...)), or log it with an input_example. More than this"
)


def summary(name: str, outcome: Outcome, why: str = "") -> AuditSummary:
    return AuditSummary(
        model=name, version=12345, outcome=outcome, coverage=1.0, failed_checks=[], failed_parameters=[], why=why,
        run_id=None, seconds=1.0, headline="", unjudged="",
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_names_are_cut_and_outcomes_never(name: str, screen: Console) -> None:
    rows = [summary(name, outcome, CURED) for outcome in Outcome]
    screen.print(display.verdicts_table(rows, "title", every=True))
    found = screen.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(cell_len(line) for line in found) <= screen.width
    for outcome in Outcome:
        (row,) = [line for line in found if re.search(rf"\s{SIGNS[outcome]} {outcome}(\s|$)", line)]
        assert "12345" in row
        begin, end = visible(name)[:5], visible(name)[-1:]
        assert row.strip().startswith(begin.strip()), "a name's beginning"
        assert visible(name) in row or f"{end}" in row.split("12345")[0].rstrip()[-2:], "and its end"
    has_words(found, "this version has no recipe and no input example, so nobody knows what to feed it")
    assert not any("log_model" in line or "More than" in line for line in found), "the cause; cures are in the report"


def test_many_passes_are_one_line_and_what_needs_a_look_comes_first(screen: Console) -> None:
    passes = [summary(f"right-{number}", Outcome.PASS) for number in range(17)]
    rows = [*passes, summary("odd", Outcome.WARN, "w"), summary("open", Outcome.INCONCLUSIVE, CURED)]
    rows.append(summary("bad", Outcome.FAIL, "its weight is wrong"))
    found = lines(screen, display.verdicts_table(rows, "title"))
    text = "\n".join(found)
    assert "✓ 17 pass" in text
    assert "right-" not in text
    assert [text.index(name) for name in ("bad", "open", "odd", "17 pass")] == sorted(
        text.index(name) for name in ("bad", "open", "odd", "17 pass")
    )


@pytest.mark.parametrize("every", [True, False])
def test_each_pass_has_its_line_when_asked_for_or_when_they_are_few(every: bool, screen: Console) -> None:
    rows = [summary(f"right-{number}", Outcome.PASS) for number in range(17 if every else display.FOLDED)]
    has_names(lines(screen, display.verdicts_table(rows, "title", every=every)), [s["model"] for s in rows])


@pytest.mark.parametrize("width", range(3, 40))
@pytest.mark.parametrize("name", ["modelモデルmodel" * 4, "plain" * 10, "📈" * 30])
def test_a_cut_name_has_its_width(name: str, width: int) -> None:
    cut = display.cut_name(name, width)
    assert cell_len(cut) <= width
    assert cell_len(cut) >= width - 3, "wide characters take two columns"
    assert "…" in cut
    assert display.cut_name(name, cell_len(name)) == name


def test_the_list_of_checks(screen: Console) -> None:
    has_names(lines(screen, checks_command.checks_table(CHECKS.values(), AuditSettings())), list(CHECKS))


@pytest.mark.parametrize(
    "columns", [["check"], ["check", "outcome"], ["check", "message"], ["name", "check", "message"]]
)
def test_sql_keeps_names_whole_and_sentences_broad(screen: Console, columns: list[str]) -> None:
    values = {"check": LONGEST, "outcome": ["fail"] * 4, "message": [MESSAGE] * 4, "name": ["a-model"] * 4}
    table = pa.table({name: values[name] for name in columns})
    sql_command._print(table, columns)
    found = lines(screen)
    has_names(found, LONGEST)
    if "message" in columns:
        has_words(found, MESSAGE)
        assert len(found) <= 4 * 6 + 5, "no tower"


@pytest.mark.slow
@pytest.mark.parametrize("width", ["80", "120"])
def test_help_shows_every_word(width: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    """Square brackets in a help text are markup to typer: what stood in them was lost."""
    monkeypatch.setenv("COLUMNS", width)
    for command in cli.app.registered_commands:
        assert command.callback is not None
        name = command.callback.__name__
        assert gradaudit(name, "--help", monkeypatch=monkeypatch, tmp_path=tmp_path) == 0
        shown = re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split()
        hints = get_type_hints(inspect.unwrap(command.callback), include_extras=True)
        texts = [
            o.help for hint in hints.values() for o in getattr(hint, "__metadata__", ()) if getattr(o, "help", None)
        ]
        missing = {word for text in [*texts, command.callback.__doc__ or ""] for word in text.split()} - set(shown)
        assert not missing, name
