"""The command line. stdout carries the result, stderr the log and the progress; exit codes 0, 1 and 2."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from audits.errors import GradauditError, InfrastructureError
from flows.settings import GradauditSettings, quiet_defaults

quiet_defaults()

#: The exit code of what could not be judged; `flows.audit_command` has those of verdicts.
NOT_JUDGED = 2

app = typer.Typer(
    name="gradaudit",
    help="Proves, for every PyTorch model version in an MLflow registry, that it can be trained correctly.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 passed (warnings allowed), 1 failed, 2 could not judge.",
)

TrackingUri = Annotated[
    str | None, typer.Option("--tracking-uri", help="MLflow server or store; MLFLOW_TRACKING_URI otherwise.")
]
Results = Annotated[
    str | None, typer.Option("--results", help="Results store: a folder or an object-store URI. [default: results]")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.command()
def audit(
    target: Annotated[str, typer.Argument(help="models:/NAME/VERSION, models:/NAME@ALIAS, or a model directory.")],
    recipe: Annotated[
        Path | None, typer.Option(help="Folder with recipe.yaml to use instead of the version's.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
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
    from flows.audit_command import audit_target

    settings = GradauditSettings.load(tracking_uri=tracking_uri, results=results, device=device)
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
    from flows.nightly_command import run_nightly

    settings = GradauditSettings.load(tracking_uri=tracking_uri, results=results)
    raise typer.Exit(run_nightly(settings, models or [], force=force, as_json=as_json))


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where the demo keeps its MLflow, Prefect and results.")] = Path(
        "demo_workspace"
    ),
    as_json: AsJson = False,
) -> None:
    """Train, register and audit the demo's models on an embedded MLflow and Prefect."""
    from flows.demo_command import run_demo

    raise typer.Exit(run_demo(folder, as_json=as_json))


@app.command()
def checks(as_json: AsJson = False) -> None:
    """List every check: its claim, its severity and its threshold."""
    import dataclasses

    from audits.checks import CHECKS

    if as_json:
        print(json.dumps([dataclasses.asdict(check) for check in CHECKS.values()], indent=2))
        return
    from flows.display import checks_table, console

    console.print(checks_table(CHECKS.values()))


@app.command()
def explain(check: Annotated[str, typer.Argument(help="A check's name, such as gradient.finite-difference.")]) -> None:
    """Explain one check: claim, formula, threshold, what it cannot see, where to look when it fails."""
    from audits.checks import find_check
    from flows.display import console, explanation

    console.print(explanation(find_check(check)))


def main() -> None:
    """Run the command line; what a person can cure is one sentence, never a traceback."""
    logging.basicConfig(
        level=os.environ.get("GRADAUDIT_LOG_LEVEL", "WARNING"),
        stream=sys.stderr,
        format="%(levelname)s %(name)s: %(message)s",
    )
    try:
        app()
    except InfrastructureError as error:
        _refuse(f"{error}", "nothing was marked; repeat when it answers")
    except GradauditError as error:
        _refuse(f"{error}")
    except KeyboardInterrupt:
        _refuse("interrupted")


def _refuse(message: str, cure: str = "") -> None:
    print(f"gradaudit: {message}{f' ({cure})' if cure else ''}", file=sys.stderr)
    sys.exit(NOT_JUDGED)


if __name__ == "__main__":
    main()
