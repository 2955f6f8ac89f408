"""A version audited as flows do it: downloaded, and judged by the child's own function."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

from mlflow.tracking import MlflowClient

from audits.report import AuditReport
from registry_models import child
from registry_models.snapshot import download_version
from registry_models.versions import VersionReference


def audited(
    client: MlflowClient, reference: str, folder: Path, *, recipes: Path | None = None, **settings: Any
) -> AuditReport:
    """Audit ``models:/NAME/VERSION`` in this process; the import path is as before afterwards."""
    folder.mkdir()
    version = VersionReference.parse(reference).resolve(client)
    snapshot = download_version(version, client, folder, recipes=recipes)
    path = list(sys.path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a child has its own warnings
            return child.run({**snapshot.request(), "settings": settings, "device": "cpu"})
    finally:
        sys.path[:] = path


def shown(report: AuditReport, check: str) -> list[str]:
    """Messages of the findings of one check."""
    return [row.message for row in report.findings if row.check == check]
