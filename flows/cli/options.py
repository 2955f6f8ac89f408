"""Options that several commands have."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

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
Since = Annotated[datetime | None, typer.Option(formats=["%Y-%m-%d"], help="Only audits from this UTC day on.")]
Interval = Annotated[float, typer.Option(min=1.0, help="Seconds between looks at the registry.")]
SinceHours = Annotated[
    float, typer.Option(min=0.0, help="Hours back within which registrations are looked at; the nightly has the rest.")
]
