"""``gradaudit demo``: the whole way, on an embedded MLflow (SQLite) and an embedded Prefect."""

from __future__ import annotations

import os
import shutil
import sys
import time
import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING

from audits.errors import InfrastructureError
from flows.cli.display import ProgressBar, verdicts_table
from flows.output import console, log_console, print_json
from flows.settings.environment import GradauditSettings

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


def run_demo(folder: Path, *, as_json: bool) -> int:
    """Train, register, audit; print the verdicts and where to look. Returns 0 when every verdict is the intended one.

    A second run reuses what the first one left in ``folder``.
    """
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    tracking_uri = f"sqlite:///{folder / 'mlflow.db'}"
    os.environ.update(
        {
            "MLFLOW_TRACKING_URI": tracking_uri,
            "GRADAUDIT_TRACKING_URI": tracking_uri,
            "GRADAUDIT_RESULTS": str(folder / "results"),
            "PREFECT_HOME": str(folder / "prefect"),
        }
    )
    os.environ.pop("PREFECT_API_URL", None)  # the demo never touches a configured server
    began = time.perf_counter()
    settings = GradauditSettings.load(tracking_uri=tracking_uri, results=str(folder / "results"))
    with log_console.status("opening MLflow"):
        import mlflow

        from flows.demo.catalogue import DEMO_VERSIONS
        from flows.demo.register import register_demo

        mlflow.set_tracking_uri(tracking_uri)
        client = mlflow.MlflowClient(tracking_uri=tracking_uri)
        _keep_artifacts_in(folder, client)
    with ProgressBar("training") as bar:
        bar.planned(len(DEMO_VERSIONS))
        register_demo(
            client, on_progress=lambda done: bar.step(f"{'found' if done.reused else 'trained'}  {done.label}")
        )
    from flows.cli.nightly_command import sweep
    from flows.demo.verdicts import committed_verdicts, surprises

    result = sweep(settings, [version.name for version in DEMO_VERSIONS], force=False)
    if result["not_audited"]:
        raise InfrastructureError(f"the sweep stopped: {'; '.join(result['troubles'])}")
    verdicts = committed_verdicts(settings.results, DEMO_VERSIONS)
    wrong = surprises(verdicts, DEMO_VERSIONS)
    if as_json:
        print_json({"audited": len(result["audited"]), "verdicts": verdicts, "surprises": wrong})
    else:
        title = f"{len(verdicts)} versions, {len(result['audited'])} audited now, {time.perf_counter() - began:.0f} s"
        console.print(verdicts_table(verdicts, title, every=True))
        _print_places(folder, client, settings)
    for text in wrong:
        log_console.print(f"[bold red]not as planted:[/] {text}")
    return 2 if wrong else 0


def _keep_artifacts_in(folder: Path, client: MlflowClient) -> None:
    """Create the experiments with their artifacts inside the demo's folder rather than the working directory."""
    for name in ("demo-training", "gradaudit"):
        if client.get_experiment_by_name(name) is None:
            client.create_experiment(name, artifact_location=(folder / "artifacts" / name).as_uri())


def _print_places(folder: Path, client: MlflowClient, settings: GradauditSettings) -> None:
    experiment = client.get_experiment_by_name(settings.experiment).experiment_id
    search = urllib.parse.quote("tags.`audit.outcome` = 'fail'")
    short = os.path.relpath(folder)
    shown = folder if short.startswith("..") else short
    rows = f"{shown}/results/rows"
    blocks = {
        "One row per parameter and check:": [
            f"{_tool('python')} -c \"import pandas; print(pandas.read_parquet('{rows}'))\"",
        ],
        "The failing runs in the MLflow UI: start it, then open the address:": [
            f"{_tool('mlflow')} server --backend-store-uri sqlite:///{shown}/mlflow.db --port 5000",
            f"http://127.0.0.1:5000/#/experiments/{experiment}/runs?searchFilter={search}",
        ],
        "One version again:": [
            f"{_tool('gradaudit')} audit models:/char-gpt/2 --tracking-uri sqlite:///{shown}/mlflow.db",
        ],
    }
    for title, lines in blocks.items():
        text = "\n  ".join([f"\n{title}", *lines])
        console.print(text, soft_wrap=True, highlight=False, markup=False)


def _tool(name: str) -> str:
    """Return how this shell starts a program of our own environment: by its name, or by its path."""
    own = Path(sys.executable).with_name(name)
    found = shutil.which(name)
    if (
        found and Path(found).absolute() == own.absolute()
    ):  # not resolved: an environment's python links to the base one
        return name
    short = os.path.relpath(own)
    return str(own) if short.startswith("..") else short
