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
from flows.cli.ending import StoppedBySignal, ended_by_exception, exit_as_ended
from flows.cli.results_cli import add_commands
from flows.cli.targets import refuse_target
from flows.output import only_results
from flows.settings.environment import GradauditSettings, quiet_defaults

quiet_defaults()

#: The exit code of what could not be judged; `flows.cli.audit_command` has those of verdicts.
NOT_JUDGED = 2

app = typer.Typer(
    name="gradaudit",
    help="Proves, for every PyTorch model version in an MLflow registry, that it can be trained correctly.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 passed (warnings allowed), 1 failed, 2 could not judge, or a wrong argument.",
)

TrackingUri = Annotated[
    str | None, typer.Option("--tracking-uri", help="MLflow server or store; MLFLOW_TRACKING_URI otherwise.")
]
Results = Annotated[
    str | None, typer.Option("--results", help="Results store: a folder or an object-store URI. (default: results)")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


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
    )
    raise typer.Exit(code)


@app.command()
def nightly(
    models: Annotated[list[str] | None, typer.Option(help="Only models of this name or glob; repeatable.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Audit what has a fresh result too.")] = False,
    as_json: AsJson = False,
    tracking_uri: TrackingUri = None,
    results: Results = None,
) -> None:
    """Audit, now, every registered version that has no fresh result."""
    settings = GradauditSettings.load(tracking_uri=tracking_uri, results=results)
    from flows.cli.nightly_command import run_nightly

    raise typer.Exit(run_nightly(settings, models or [], force=force, as_json=as_json))


@app.command()
def setup(
    cron: Annotated[str | None, typer.Option(help="When the nightly starts. (default: 0 2 * * *)")] = None,
    timezone: Annotated[str | None, typer.Option(help="The schedule's time zone, such as Europe/Berlin.")] = None,
    notify: Annotated[
        str | None,
        typer.Option(help="Block told of newly failed versions, such as slack-webhook/team; `none` stops that."),
    ] = None,
    event_trigger: Annotated[
        bool, typer.Option("--event-trigger", help="Audit what an event mlflow.model-version.created names.")
    ] = False,
    file: Annotated[Path | None, typer.Option(help="Your own prefect.yaml; that of gradaudit otherwise.")] = None,
    pool_type: Annotated[str, typer.Option(help="Type of work pools that do not exist yet.")] = "process",
) -> None:
    """Create pools, queues, deployments and automations on the Prefect server at PREFECT_API_URL; repeat at will."""
    from flows.output import console, log_console
    from flows.service.setup import SetupOptions, set_up

    options = SetupOptions(cron, timezone, notify, event_trigger, file, pool_type)
    with log_console.status("setting up Prefect"):
        lines = set_up(options)
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


Interval = Annotated[float, typer.Option(min=1.0, help="Seconds between looks at the registry.")]
SinceHours = Annotated[
    float, typer.Option(min=0.0, help="Hours back within which registrations are looked at; the nightly has the rest.")
]


@app.command()
def webhook(
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at.")] = 8765,
    register: Annotated[bool, typer.Option("--register", help="Create or correct the webhook in MLflow.")] = False,
    public_url: Annotated[
        str | None, typer.Option(help="Where MLflow reaches this process. (default: http://HOST:PORT)")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Take events that nobody signed.")] = False,
    interval: Interval = 10.0,
    since_hours: SinceHours = 24.0,
    tracking_uri: TrackingUri = None,
    results: Results = None,
) -> None:
    """Receive MLflow's registration events, have each version audited within a minute, and reconcile."""
    settings = GradauditSettings.load(tracking_uri=tracking_uri, results=results)
    from flows.service.webhook import WebhookOptions, run_webhook

    options = WebhookOptions(host, port, insecure, register, public_url, interval, since_hours)
    raise typer.Exit(run_webhook(options, settings))


@app.command()
def watch(
    interval: Interval = 10.0,
    since_hours: SinceHours = 24.0,
    tracking_uri: TrackingUri = None,
    results: Results = None,
) -> None:
    """Look for registered versions without a result and have them audited: the webhook's loop alone."""
    from flows.service.watching import run_watch

    settings = GradauditSettings.load(tracking_uri=tracking_uri, results=results)
    raise typer.Exit(run_watch(settings, interval=interval, since_hours=since_hours))


@app.command()
def up(
    folder: Annotated[Path, typer.Option(help="Where everything is kept: databases, results, logs, secrets.")] = Path(
        "gradaudit_data"
    ),
    mlflow_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Of MLflow's server and UI; 0: any free one.")
    ] = 5000,
    prefect_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Of Prefect's server and UI; 0: any free one.")
    ] = 4200,
    webhook_port: Annotated[int, typer.Option(min=0, max=65535, help="Of the webhook; 0: any free one.")] = 8765,
    gpus: Annotated[str, typer.Option(help="all, none, or numbers such as 0,1: one worker each.")] = "all",
) -> None:
    """Run everything on this machine: MLflow, Prefect, workers, webhook, deployments; one Ctrl-C ends it."""
    from flows.arguments import refuse_file
    from flows.service.up import UpOptions, run_up

    refuse_file(folder, "--folder")
    raise typer.Exit(run_up(UpOptions(folder, mlflow_port, prefect_port, webhook_port, gpus), os.environ))


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


add_commands(app)
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
