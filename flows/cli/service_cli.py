"""The commands that set up and run services: ``setup``, ``webhook``, ``watch``, ``up``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.options import Interval, Results, SinceHours, TrackingUri
from flows.settings.environment import GradauditSettings


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


def add_service_commands(app: typer.Typer) -> None:
    """Add them to the command line, in the order of its help."""
    for command in (setup, webhook, watch, up):
        app.command()(command)
