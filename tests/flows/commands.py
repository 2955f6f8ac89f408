"""Commands as processes of their own, and what shows from outside how far they have come."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from mlflow.tracking import MlflowClient


def start(arguments: list[str], folder: Path, client: MlflowClient) -> subprocess.Popen[str]:
    """Start ``gradaudit`` in ``folder``, which is its home and keeps its results and its temporary files as well."""
    (folder / "tmp").mkdir(exist_ok=True)
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": client.tracking_uri,
        "HOME": str(folder / "home"),
        "PREFECT_HOME": str(folder / "prefect"),
        "TMPDIR": str(folder / "tmp"),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli", *arguments],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def committed(folder: Path) -> list[Path]:
    """Return the files of the audits that are done."""
    return list((folder / "results" / "audits").rglob("*.parquet"))


def private_folders(folder: Path) -> list[Path]:
    """Return the private folders of audits under way; one is gone before its audit is committed."""
    return list((folder / "tmp").glob("gradaudit-audit-*"))


def at_work(folder: Path) -> list[Path]:
    """Return the folders of the children that were asked and whose audits are under way."""
    return [attempt for private in private_folders(folder) for attempt in private.glob("plan-*/attempt-*")]


def wait_until(reached: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Wait for a point on the way of a command that has not ended."""
    deadline = time.monotonic() + 180
    while not reached():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
