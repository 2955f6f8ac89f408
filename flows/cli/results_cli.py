"""The commands that read stored results: ``report``, ``history``, ``diff``, ``sql``; and ``compact`` and ``attach``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.options import AsCsv, AsJson, Html, Junit, Results, Since, TrackingUri
from flows.settings.environment import GradauditSettings


def report(
    target: Annotated[str, typer.Argument(help="models:/NAME/VERSION, models:/NAME@ALIAS, or an audit's id.")],
    as_json: AsJson = False,
    junit: Junit = None,
    html: Html = None,
    tracking_uri: TrackingUri = None,
    results: Results = None,
) -> None:
    """Show the newest stored audit of a version again, without auditing it."""
    settings = GradauditSettings.load(tracking_uri=tracking_uri, results=results)
    from flows.cli.report_command import show_report

    raise typer.Exit(show_report(target, settings, as_json=as_json, junit=junit, html=html))


def history(
    model: Annotated[str, typer.Argument(help="A registered model's name.")],
    parameter: Annotated[str | None, typer.Option(help="Only parameters of this name or glob.")] = None,
    check: Annotated[str | None, typer.Option(help="Only checks of this name or glob.")] = None,
    since: Since = None,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
    results: Results = None,
) -> None:
    """Show a model's parameters over time: one line per audit and parameter, and since when one fails."""
    settings = GradauditSettings.load(results=results)
    from flows.cli.history_command import show_history

    day = None if since is None else since.date()
    code = show_history(model, settings, parameter=parameter, check=check, since=day, as_json=as_json, as_csv=as_csv)
    raise typer.Exit(code)


def diff(
    before: Annotated[str, typer.Argument(help="models:/NAME/VERSION, models:/NAME@ALIAS, or an audit's id.")],
    now: Annotated[str, typer.Argument(help="The later one, likewise.")],
    as_json: AsJson = False,
    tracking_uri: TrackingUri = None,
    results: Results = None,
) -> None:
    """Hold one audited version against another: what is new, fixed, the same, and what can be behind it."""
    settings = GradauditSettings.load(tracking_uri=tracking_uri, results=results)
    from flows.cli.diff_command import show_diff

    raise typer.Exit(show_diff(before, now, settings, as_json=as_json))


def sql(
    query: Annotated[str, typer.Argument(help="One SELECT over the views rows, audits and failures; - reads stdin.")],
    since: Since = None,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
    results: Results = None,
) -> None:
    """Ask the results store in SQL (DuckDB); nothing else can be read, and nothing written."""
    settings = GradauditSettings.load(results=results)
    from flows.cli.sql_command import show_query

    day = None if since is None else since.date()
    raise typer.Exit(show_query(query, settings, since=day, as_json=as_json, as_csv=as_csv))


def compact(
    month: Annotated[list[str] | None, typer.Option(help="Merge this month, as 2026-10; repeatable.")] = None,
    as_json: AsJson = False,
    results: Results = None,
) -> None:
    """Merge small result files: each past day's into one, and each ended month's; the nightly does the days."""
    from flows.cli.compact_command import run_compaction

    raise typer.Exit(run_compaction(GradauditSettings.load(results=results), month or [], as_json=as_json))


def attach(
    version: Annotated[str, typer.Argument(help="models:/NAME/VERSION or models:/NAME@ALIAS.")],
    recipe: Annotated[Path, typer.Argument(help="Folder with recipe.yaml and its tensors.")],
    as_json: AsJson = False,
    tracking_uri: TrackingUri = None,
) -> None:
    """Give an already registered version a recipe."""
    from flows.cli.attach_command import attach_folder

    raise typer.Exit(attach_folder(version, recipe, GradauditSettings.load(tracking_uri=tracking_uri), as_json=as_json))


def add_result_commands(app: typer.Typer) -> None:
    """Add them to the command line, in the order of its help."""
    for command in (report, history, diff, sql, compact, attach):
        app.command()(command)
