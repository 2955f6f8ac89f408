"""The child's answer: one Arrow file of rows and one small JSON, written by the child, validated by the parent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from audits.errors import ArtifactError
from audits.outcomes import Coverage, Lane, Outcome, ResultRow, Severity
from audits.report import AuditReport
from audits.result_format import ANSWER_SCHEMA, AuditIdentity, answer_table
from registry_models.untrusted_text import clean as without_unsafe

ROWS_FILE, SUMMARY_FILE = "rows.arrow", "summary.json"

#: Caps on what a child may answer. 2,000 tensors give about 30,000 rows of at most 1 kB.
MAXIMUM_ROWS_BYTES = 256 * 2**20
MAXIMUM_SUMMARY_BYTES = 8 * 2**20
MAXIMUM_ROWS = 1_000_000
MAXIMUM_TEXT = 2_000
MAXIMUM_LIMITS = 10
MAXIMUM_PARTS = 20

#: Identity fields that only the child knows.
_IDENTITY = ("recipe_digest", "settings_digest", "torch", "device", "driver")


def write_answer(report: AuditReport, folder: Path) -> None:
    """Write the report for the parent; the summary comes last and marks the answer as complete."""
    with pa.OSFile(str(folder / ROWS_FILE), "wb") as sink, pa.ipc.new_file(sink, ANSWER_SCHEMA) as writer:
        writer.write_table(answer_table(report.rows))
    identity, coverage = report.identity, report.coverage_of
    summary = {
        "coverage": {
            "tensors": coverage.tensors,
            "elements": coverage.elements,
            "unresolved": list(coverage.unresolved),
        },
        "seconds": report.seconds,
        "provenance": dict(report.provenance),
        "limits": list(report.limits),
        "parts": dict(report.parts),
        "recipe_digest": identity.recipe_digest,
        "settings_digest": identity.settings_digest,
        "torch": identity.torch,
        "device": identity.device,
        "driver": identity.driver,
    }
    temporary = folder / f"{SUMMARY_FILE}.tmp"
    temporary.write_text(json.dumps(summary), encoding="utf-8")
    temporary.rename(folder / SUMMARY_FILE)


def read_answer(folder: Path) -> AuditReport:
    """Read and validate a child's answer. Nothing in it is trusted: schema, sizes and enumerations are checked.

    Raises:
        ArtifactError: the answer is missing, too large, or not of the agreed form.
    """
    try:
        summary = _read_summary(folder / SUMMARY_FILE)
        rows = _read_rows(folder / ROWS_FILE)
        coverage = summary["coverage"]
        identity: dict[str, Any] = {name: clean(str(summary[name]), 200) for name in _IDENTITY}
        return AuditReport(
            rows=tuple(rows),
            coverage_of=Coverage(
                tensors=_share(coverage["tensors"]),
                elements=_share(coverage["elements"]),
                unresolved=tuple(clean(str(name)) for name in coverage["unresolved"]),
            ),
            identity=AuditIdentity(**identity),
            seconds=float(summary["seconds"]),
            provenance={clean(str(k), 100): clean(str(v), 1000) for k, v in summary["provenance"].items()},
            limits=tuple(clean(str(text)) for text in summary.get("limits", ())[:MAXIMUM_LIMITS]),
            parts=_parts(summary.get("parts", {})),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OSError, pa.ArrowException) as error:
        raise ArtifactError(f"the audit's answer is not of the agreed form: {type(error).__name__}: {error}") from error


def clean(text: str, limit: int = MAXIMUM_TEXT) -> str:
    """Drop control and direction characters and cap the length of a text that comes from a model."""
    return without_unsafe(text)[:limit]


def _read_summary(path: Path) -> dict[str, Any]:
    if not path.is_file() or path.is_symlink():
        raise ArtifactError("the audit gave no answer")
    if path.stat().st_size > MAXIMUM_SUMMARY_BYTES:
        raise ArtifactError("the audit's summary is too large")
    summary = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(summary, dict):
        raise ArtifactError("the audit's summary is no object")
    return summary


def _read_rows(path: Path) -> list[ResultRow]:
    if not path.is_file() or path.is_symlink() or path.stat().st_size > MAXIMUM_ROWS_BYTES:
        raise ArtifactError("the audit's rows are missing or too large")
    with pa.OSFile(str(path), "rb") as source, pa.ipc.open_file(source) as reader:
        if not reader.schema.equals(ANSWER_SCHEMA):
            raise ArtifactError("the audit's rows have another schema")
        batches = []
        count = 0
        for index in range(reader.num_record_batches):
            batch = reader.get_batch(index)
            batch.validate(full=True)
            count += batch.num_rows
            if count > MAXIMUM_ROWS:
                raise ArtifactError(f"the audit answered with more than {MAXIMUM_ROWS:,} rows")
            batches.append(batch)
        table = pa.Table.from_batches(batches, ANSWER_SCHEMA)
    return [_row(values) for values in table.to_pylist()]


def _row(values: dict[str, Any]) -> ResultRow:
    values.pop("row")
    for name, value in values.items():
        if isinstance(value, str):
            values[name] = clean(value)
    return ResultRow(
        **{
            **values,
            "outcome": Outcome(values["outcome"]),
            "severity": Severity(values["severity"]),
            "lane": None if values["lane"] is None else Lane(values["lane"]),
            "message": values["message"] or "",
        }
    )


def _parts(value: Any) -> dict[str, str]:
    parts = {clean(str(k), 50): clean(str(v), 50) for k, v in value.items()}
    if len(parts) > MAXIMUM_PARTS:
        raise ArtifactError(f"the audit's answer has more than {MAXIMUM_PARTS} parts")
    return parts


def _share(value: Any) -> float:
    share = float(value)
    if not 0.0 <= share <= 1.0:
        raise ArtifactError(f"the audit's coverage is {share}, no share")
    return share
