"""The command line. stdout carries the result, stderr the log and the progress; exit codes 0, 1 and 2."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from importlib import metadata
from pathlib import Path
from textwrap import wrap
from typing import Annotated, Any

import typer

from audits.errors import GradauditError, InfrastructureError, SetupError
from audits.parts import missing_part
from flows.cli.ending import StoppedBySignal, ended_by_exception, exit_as_ended
from flows.cli.exit_codes import NOT_JUDGED, FailOn
from flows.cli.gate_cli import add_gate_commands
from flows.cli.options import AsJson, Counted, ExitZero, Results, TrackingUri
from flows.cli.results_cli import add_result_commands
from flows.cli.service_cli import add_service_commands
from flows.cli.targets import refuse_target
from flows.output import only_results
from flows.settings.environment import GradauditSettings, quiet_defaults

quiet_defaults()

app = typer.Typer(
    name="gradaudit",
    help="Proves, for every PyTorch model version in an MLflow registry, that it can be trained correctly.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 passed (warnings allowed), 1 failed, 2 could not judge, or a wrong argument.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gradaudit {metadata.version('gradaudit')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    pass


@app.command()
def audit(
    target: Annotated[str, typer.Argument(help="models:/NAME/VERSION, models:/NAME@ALIAS, or a model directory.")],
    recipe: Annotated[
        Path | None, typer.Option(help="Folder with recipe.yaml to use instead of the version's.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or any type torch finds.")] = None,
    as_json: AsJson = False,
    junit: Annotated[Path | None, typer.Option(help="Write a JUnit XML file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report as one HTML file.")] = None,
    no_mark: Annotated[bool, typer.Option("--no-mark", help="Store, publish and mark nothing.")] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of the audit's random draws.")] = None,
    check: Annotated[list[str] | None, typer.Option(help="Only checks of this name or glob; repeatable.")] = None,
    parameter: Annotated[list[str] | None, typer.Option(help="Only parameters of this glob; repeatable.")] = None,
    method: Annotated[
        str | None, typer.Option(help="Gradient method: auto, probe, exact, elementwise, gradcheck.")
    ] = None,
    fail_on: Counted = FailOn.INCONCLUSIVE,
    exit_zero: ExitZero = False,
    tracking_uri: TrackingUri = None,
    results: Results = None,
) -> None:
    """Audit one version now: is its gradient right, and does its optimizer do what its rule says?"""
    refuse_target(target)
    settings = GradauditSettings.load(tracking_uri=tracking_uri, results=results, device=device)
    from flows.cli.audit_command import audit_target

    narrowing: dict[str, Any] = {"seed": seed, "checks": check, "parameters": parameter, "method": method}
    code = audit_target(
        target,
        settings,
        {k: v for k, v in narrowing.items() if v is not None},
        recipe=recipe,
        mark=not no_mark,
        as_json=as_json,
        junit=junit,
        html=html,
        fail_on=fail_on,
        exit_zero=exit_zero,
    )
    raise typer.Exit(code)


@app.command()
def nightly(
    models: Annotated[list[str] | None, typer.Option(help="Only models of this name or glob; repeatable.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Audit what has a fresh result too.")] = False,
    every: Annotated[
        bool, typer.Option("--all", "--verbose", help="Also show each pass, and each version outside the audit.")
    ] = False,
    fail_on: Counted = FailOn.INCONCLUSIVE,
    exit_zero: ExitZero = False,
    as_json: AsJson = False,
    tracking_uri: TrackingUri = None,
    results: Results = None,
) -> None:
    """Audit, now, every registered version that has no fresh result; other libraries' models are only counted."""
    settings = GradauditSettings.load(tracking_uri=tracking_uri, results=results)
    from flows.cli.nightly_command import run_nightly

    code = run_nightly(
        settings,
        models or [],
        force=force,
        as_json=as_json,
        every=every,
        fail_on=fail_on,
        exit_zero=exit_zero,
    )
    raise typer.Exit(code)


add_service_commands(app)


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where the demo keeps its MLflow, Prefect and results.")] = Path(
        "demo_workspace"
    ),
    as_json: AsJson = False,
) -> None:
    """Train, register and audit the demo's models on an embedded MLflow and Prefect."""
    from flows.arguments import refuse_file
    from flows.cli.demo_command import run_demo

    refuse_file(folder, "--folder")
    raise typer.Exit(run_demo(folder, as_json=as_json))


@app.command()
def checks(as_json: AsJson = False) -> None:
    """List every check: its claim, its severity and its threshold."""
    from flows.cli.checks_command import run_checks
    from flows.settings.environment import GradauditSettings

    raise typer.Exit(run_checks(GradauditSettings.load(), as_json=as_json))


@app.command()
def explain(
    check: Annotated[str, typer.Argument(help="A check's name, such as gradient.finite-difference.")],
    as_json: AsJson = False,
) -> None:
    """Explain one check: claim, formula, threshold, what it cannot see, where to look when it fails."""
    from flows.cli.checks_command import run_explain
    from flows.settings.environment import GradauditSettings

    raise typer.Exit(run_explain(check, GradauditSettings.load(), as_json=as_json))


@app.command()
def settings(
    model: Annotated[str | None, typer.Option(help="Show the audits of this model.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show every setting in force and where it comes from: command line, environment, gradaudit.toml, default."""
    from flows.cli.settings_command import show_settings

    raise typer.Exit(show_settings(GradauditSettings.load(), model, as_json=as_json))


add_gate_commands(app)
add_result_commands(app)
for _command in app.registered_commands:
    assert _command.callback is not None
    _command.callback = only_results(_command.callback)


def main() -> None:
    """Run the command line; what a person can cure is one sentence, never a traceback."""
    logging.basicConfig(
        level=os.environ.get("GRADAUDIT_LOG_LEVEL", "WARNING"),
        stream=sys.stderr,
        format="%(levelname)s %(name)s: %(message)s",
    )
    if "GRADAUDIT_LOG_LEVEL" not in os.environ:  # each retry is a paragraph of it, and the last one is said anyway
        logging.getLogger("urllib3").setLevel(logging.ERROR)
    try:
        with ended_by_exception():
            app(prog_name="gradaudit")
    except SetupError as error:
        _refuse(f"{error}", "nothing was marked")
    except InfrastructureError as error:
        done = getattr(error, "done", 0)  # a sweep's
        marked = f"{done} audited before that" if done else "nothing was marked"
        _refuse(f"{error}", f"{marked}; repeat when it answers")
    except GradauditError as error:
        _refuse(f"{error}")
    except ModuleNotFoundError as error:
        if (missing := missing_part(error)) is None:
            raise
        _refuse(f"{missing}")
    except StoppedBySignal as stopped:
        print(f"gradaudit: stopped; {stopped.told or 'nothing was marked'}", file=sys.stderr, flush=True)
        exit_as_ended(stopped.number)
    except KeyboardInterrupt:
        _refuse("stopped")
    except Exception as error:  # exit code 1, Python's own for this, would say that the model failed
        logging.getLogger(__name__).exception("an error of gradaudit's own")
        _refuse(f"{type(error).__name__}: {error}", "an error of gradaudit's own; nothing was judged")


def _refuse(message: str, cure: str = "") -> None:
    text = f"gradaudit: {message}{f' ({cure})' if cure else ''}"
    if sys.stderr.isatty():  # a terminal would break the line within words
        width = shutil.get_terminal_size().columns
        lines = (wrap(line, width, break_long_words=False, break_on_hyphens=False) for line in text.splitlines())
        text = "\n".join("\n".join(found) for found in lines)
    print(text, file=sys.stderr)
    sys.exit(NOT_JUDGED)
