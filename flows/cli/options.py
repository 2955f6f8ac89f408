"""Options that several commands have."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.exit_codes import FailOn

TrackingUri = Annotated[
    str | None, typer.Option("--tracking-uri", help="MLflow server or store; MLFLOW_TRACKING_URI otherwise.")
]
Results = Annotated[
    str | None, typer.Option("--results", help="Results store: a folder or an object-store URI. (default: results)")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
AsCsv = Annotated[bool, typer.Option("--csv", help="Print the result as CSV.")]
Junit = Annotated[Path | None, typer.Option(help="Write a JUnit XML file.")]
Html = Annotated[Path | None, typer.Option(help="Write the report as one HTML file.")]
ExitZero = Annotated[
    bool,
    typer.Option("--exit-zero", help="End with 0 whatever the verdicts; 2 stays for what could not be carried out."),
]
Counted = Annotated[
    FailOn,
    typer.Option(
        "--fail-on",
        help="What ends with another code than 0, each with those before it: newly-failed (it did not fail before), "
        "fail, inconclusive (it could not be judged, and nobody excused it).",
    ),
]
Since = Annotated[datetime | None, typer.Option(formats=["%Y-%m-%d"], help="Only audits from this UTC day on.")]
Interval = Annotated[float, typer.Option(min=1.0, help="Seconds between looks at the registry.")]
SinceHours = Annotated[
    float, typer.Option(min=0.0, help="Hours back within which registrations are looked at; the nightly has the rest.")
]
