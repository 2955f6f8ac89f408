"""A version audited as flows do it: downloaded, and judged by the child's own function."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

from mlflow.tracking import MlflowClient

from audits.report import AuditReport
from registry_models.artifacts.snapshot import download_version
from registry_models.child import carrying_out as child
from registry_models.child.answer import read_answer
from registry_models.registry.versions import VersionReference


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


def in_a_child(client: MlflowClient, reference: str, folder: Path) -> AuditReport:
    """Audit in a process of its own, in an empty directory, which must not have imported MLflow."""
    folder.mkdir()
    snapshot = download_version(VersionReference.parse(reference).resolve(client), client, folder)
    answer, empty = folder / "answer.jsonl", folder / "empty"
    empty.mkdir()
    reading, writing = os.pipe()
    request = {**snapshot.request(), "settings": {}, "device": "cpu", "answer": writing}
    (folder / "request.json").write_text(json.dumps(request))
    root = str(Path(__file__).resolve().parents[2])
    code = (
        f"import sys; sys.path[0] = {root!r}; from registry_models.child.carrying_out import main; main();"
        "print([name for name in ('mlflow', 'prefect') if name in sys.modules])"
    )
    request_file = (folder / "request.json").open("rb")
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=empty,
        stdin=request_file,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        pass_fds=(writing,),
        env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
    )
    request_file.close()
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        answer.write_bytes(stream.read())
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    assert printed.strip().endswith("[]"), "the child imports neither MLflow nor Prefect"
    return read_answer(answer)
