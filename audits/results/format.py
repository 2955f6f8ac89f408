"""The result format: the Arrow schemas of rows and audits, and the tables made by them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from audits.outcomes import ResultRow
from audits.results.identity import AuditIdentity as AuditIdentity

#: Version of the result format. Columns are only ever added; a changed meaning needs a new number.
SCHEMA_VERSION = 1


def _field(name: str, kind: pa.DataType, text: str) -> pa.Field:
    return pa.field(name, kind, metadata={"description": text})


_STRING, _FLOAT = pa.string(), pa.float64()
_STRINGS, _MAP = pa.list_(pa.string()), pa.map_(pa.string(), pa.string())

IDENTITY_FIELDS = (
    _field("audit_id", _STRING, "digest of fingerprint and occasion; a retry has the same, a re-audit another"),
    _field("audited_at", pa.timestamp("us", tz="UTC"), "when the audit ended, UTC"),
    _field("model_name", _STRING, "registered model's name"),
    _field("model_version", pa.int32(), "version number; null for a local directory"),
    _field("model_digest", _STRING, "digest of the version's files"),
    _field("recipe_digest", _STRING, "digest of the recipe, its tensors included"),
    _field("settings_digest", _STRING, "digest of the audit's settings"),
    _field("torch", _STRING, "torch's version"),
    _field("device", _STRING, "device the audit ran on: cpu, or the GPU's name"),
    _field("driver", _STRING, "CUDA version torch was built for; empty on CPU"),
    _field("artifact_kind", _STRING, "eager, pickle, exported, transformers, unknown; live for a model in process"),
    _field("isolation", _STRING, "how the audit's process was confined"),
)
ROW_FIELDS = (
    _field("row", pa.int32(), "position of the row within its audit, from 0"),
    _field("check", _STRING, "the check's name, as `gradaudit checks` lists them"),
    _field("outcome", _STRING, "pass, warn, fail, inconclusive or skipped"),
    _field("severity", _STRING, "what a failure does to the version: fail or warn"),
    _field("phase", _STRING, "phase of the training step; null for the whole model"),
    _field("step", pa.int16(), "training step, from 1; null where steps do not matter"),
    _field("lane", _STRING, "native, float64, float32 or synthetic"),
    _field("parameter", _STRING, "canonical parameter name; null for the whole model or phase"),
    _field("module", _STRING, "class and path of the module that holds the parameter"),
    _field("numel", pa.int64(), "number of elements of the parameter"),
    _field("dtype", _STRING, "the parameter's dtype in the native lane"),
    _field("measured", _FLOAT, "the number the check measured; its unit is the check's"),
    _field("expected", _FLOAT, "the number it was compared with, same unit"),
    _field("error", _FLOAT, "the deviation that was judged; same unit as threshold"),
    _field("threshold", _FLOAT, "largest error that passes"),
    _field("detection_limit", _FLOAT, "smallest relative error this row would have found"),
    _field("parameter_norm", _FLOAT, "Euclidean norm of the parameter"),
    _field("gradient_norm", _FLOAT, "Euclidean norm of its gradient"),
    _field("update_norm", _FLOAT, "Euclidean norm of its change in the step"),
    _field("seed", pa.int64(), "seed of the random draws behind the row"),
    _field("cause", _STRING, "short machine-readable reason, such as 'canonical step' or 'unresolved'"),
    _field("message", _STRING, "one sentence for a person"),
    _field("where_to_look", _STRING, "advice on a finding"),
    _field("waiver", _STRING, "reason, owner and end of the waiver that excuses the finding; it then only warns"),
)
ROWS_SCHEMA = pa.schema([*IDENTITY_FIELDS, *ROW_FIELDS], metadata={"schema_version": str(SCHEMA_VERSION)})
#: What an audit's child process answers with: rows without identity, which its parent adds.
ANSWER_SCHEMA = pa.schema(ROW_FIELDS, metadata={"schema_version": str(SCHEMA_VERSION)})
AUDITS_SCHEMA = pa.schema(
    [
        *IDENTITY_FIELDS,
        _field("outcome", _STRING, "the version's outcome"),
        _field("coverage", _FLOAT, "share of trainable tensors whose gradient and update were resolved, 0 to 1"),
        _field("coverage_elements", _FLOAT, "the same share by elements"),
        _field("n_pass", pa.int32(), "rows that passed"),
        _field("n_warn", pa.int32(), "rows that warned"),
        _field("n_fail", pa.int32(), "rows that failed"),
        _field("n_inconclusive", pa.int32(), "rows that could not tell"),
        _field("n_skipped", pa.int32(), "rows that were skipped, with their reason"),
        _field("seconds", _FLOAT, "duration of the audit's own work"),
        _field("run_id", _STRING, "MLflow run that holds the report"),
        _field("fingerprint", _STRING, "digest of everything the verdict depends on"),
        _field("due_key", _STRING, "digest that tells without a download whether a version has changed"),
        _field("environment", _STRING, "gradaudit, torch, device setting and driver that the audit ran with"),
        _field("occasion", _STRING, "why it was audited: registration, a night's date, or a forced run's id"),
        _field("message", _STRING, "the verdict in one sentence"),
        _field("parts", _MAP, "digest of each part the verdict depends on: weights, files, sources, loss, ..."),
        _field("provenance", _MAP, "recipe field, and who declared it or that it is assumed"),
        _field("limits", _STRINGS, "sentences on what this audit could not see"),
        _field("unresolved", _STRINGS, "trainable parameters whose gradient or update was not resolved"),
        _field("waivers", _STRINGS, "ids of the waivers that excuse a finding of this audit"),
        _field("unjudged", _STRING, "what kept an inconclusive version from being judged, as a cause; else null"),
    ],
    metadata={"schema_version": str(SCHEMA_VERSION)},
)


def answer_table(rows: Sequence[ResultRow]) -> pa.Table:
    """Return the rows as a table of `ANSWER_SCHEMA`."""
    names = [field.name for field in dataclasses.fields(ResultRow)]
    columns: dict[str, list[Any]] = {name: [getattr(row, name) for row in rows] for name in names}
    columns["row"] = list(range(len(rows)))
    for name in ("outcome", "severity", "lane"):
        columns[name] = [None if value is None else str(value) for value in columns[name]]
    return pa.table({field.name: pa.array(columns[field.name], field.type) for field in ROW_FIELDS}, ANSWER_SCHEMA)


def rows_table(answer: pa.Table, identity: AuditIdentity) -> pa.Table:
    """Add the identity columns to an answer: a table of `ROWS_SCHEMA`."""
    columns = [pa.repeat(pa.scalar(getattr(identity, f.name), f.type), answer.num_rows) for f in IDENTITY_FIELDS]
    return pa.table([*columns, *(answer.column(f.name) for f in ROW_FIELDS)], schema=ROWS_SCHEMA)


def audits_table(identity: AuditIdentity, **values: Any) -> pa.Table:
    """Return one audit's line as a table of `AUDITS_SCHEMA`."""
    line = {f.name: getattr(identity, f.name) for f in IDENTITY_FIELDS} | {"environment": "", "unjudged": None} | values
    return pa.table({f.name: pa.array([_plain(line, f)], f.type) for f in AUDITS_SCHEMA}, schema=AUDITS_SCHEMA)


def _plain(line: Mapping[str, Any], field: pa.Field) -> Any:
    """A value as Arrow takes it: mappings as pairs; only lists and maps may be left out."""
    value = line.get(field.name) if pa.types.is_nested(field.type) else line[field.name]
    return list(value.items()) if isinstance(value, Mapping) else list(value) if isinstance(value, tuple) else value
