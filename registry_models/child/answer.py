"""The child's answer: lines of JSON through a pipe, one a row and a last one for the rest; validated by the parent.

JSON unfolds to what it is long, nothing in it names a place, and a line is read at a time: the parent needs memory for
the rows and for no more. The child writes no file that the parent would have to find, open or remove.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from audits.checks import CHECKS
from audits.errors import ArtifactError
from audits.outcomes import Coverage, Lane, Outcome, ResultRow, Severity
from audits.report import AuditReport
from audits.results.identity import AuditIdentity
from registry_models.untrusted_text import clean as without_unsafe

#: Caps on what a child may answer. 2,000 tensors give about 30,000 rows of 0.5 kB.
MAXIMUM_BYTES = 128 * 2**20
MAXIMUM_LINE = 16 * 2**20
MAXIMUM_ROWS = 150_000
MAXIMUM_TEXT = 2_000
MAXIMUM_NAME = 500
MAXIMUM_UNRESOLVED = 20_000
MAXIMUM_LIMITS = 10
MAXIMUM_PARTS = 20

#: What the last line holds, and nothing else has.
_LAST = "answered"

#: Identity fields that only the child knows.
_IDENTITY = ("recipe_digest", "settings_digest", "torch", "device", "driver")

_KINDS = typing.get_type_hints(ResultRow)
_FIELDS = tuple(_KINDS)
#: Numbers of a row that have no sign.
_SIZES = ("detection_limit", "parameter_norm", "gradient_norm", "update_norm")
#: Texts of a row that are a sentence; the others are names.
_SENTENCES = ("message", "where_to_look", "waiver", "cause")


def write_answer(report: AuditReport, stream: BinaryIO) -> None:
    """Write the report for the parent; the last line marks the answer as complete."""
    if len(report.rows) > MAXIMUM_ROWS:
        from audits.refusals import refused

        report = refused(
            f"the audit has {len(report.rows):,} rows, more than the {MAXIMUM_ROWS:,} that one answer holds: narrow it "
            "with --check or --parameter"
        )
    for row in report.rows:
        values = ((name, getattr(row, name)) for name in _FIELDS)
        stream.write(_line({name: _plain(value) for name, value in values if value is not None}))
    identity, coverage = report.identity, report.coverage_of
    last = {
        _LAST: len(report.rows),
        "coverage": dataclasses.asdict(coverage),
        "seconds": report.seconds,
        "provenance": dict(report.provenance),
        "limits": list(report.limits),
        "parts": dict(report.parts),
        **{name: getattr(identity, name) for name in _IDENTITY},
    }
    stream.write(_line(last))
    stream.flush()


def _line(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=True).encode("ascii") + b"\n"


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float, str)) and not hasattr(value, "value") else str(value)


def read_answer(path: Path, *, seconds: float = math.inf) -> AuditReport:
    """Read and validate a child's answer. Nothing in it is trusted: sizes, types, names and numbers are checked.

    Args:
        path: the file that the parent wrote what came through the pipe into.
        seconds: how long the child ran by the parent's own clock; it cannot have worked longer.

    Raises:
        ArtifactError: the answer is missing, incomplete, too large, or not of the agreed form.
    """
    if not path.is_file() or not path.stat().st_size:
        raise ArtifactError("the audit gave no answer")
    if path.stat().st_size > MAXIMUM_BYTES:
        raise ArtifactError(f"the audit's answer is larger than {MAXIMUM_BYTES // 2**20} MiB")
    try:
        return _report(_lines(path), seconds)
    except ArtifactError:
        raise
    except Exception as error:  # deep nesting, numbers beyond any type, keys that are missing: all one kind of wrong
        told = clean(f"{type(error).__name__}: {error}", MAXIMUM_NAME)
        raise ArtifactError(f"the audit's answer is not of the agreed form: {told}") from error


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as stream:
        while line := stream.readline(MAXIMUM_LINE + 1):
            if len(line) > MAXIMUM_LINE:
                raise ArtifactError(f"a line of the audit's answer is longer than {MAXIMUM_LINE // 2**20} MiB")
            if not line.endswith(b"\n"):
                raise ArtifactError("the audit's answer is incomplete")
            values = json.loads(line)
            if not isinstance(values, dict):
                raise ArtifactError("a line of the audit's answer is not an object")
            yield values


def _report(lines: Iterator[dict[str, Any]], seconds: float) -> AuditReport:
    rows: list[ResultRow] = []
    for values in lines:
        if _LAST not in values:
            rows.append(_row(values))
            if len(rows) > MAXIMUM_ROWS:
                raise ArtifactError(f"the audit answered with more than {MAXIMUM_ROWS:,} rows")
            continue
        if values[_LAST] != len(rows) or next(lines, None) is not None:
            raise ArtifactError("the audit's answer is not in one piece")
        return _whole(rows, values, seconds)
    raise ArtifactError("the audit's answer is incomplete")


def _whole(rows: list[ResultRow], last: dict[str, Any], seconds: float) -> AuditReport:
    coverage = last["coverage"]
    identity: dict[str, Any] = {name: clean(str(last[name]), 200) for name in _IDENTITY}
    took = _number(last["seconds"])
    if not 0.0 <= took <= seconds:
        raise ArtifactError(f"the audit says that it took {took:g} s, which is not possible")
    return AuditReport(
        rows=tuple(rows),
        coverage_of=Coverage(
            tensors=_share(coverage["tensors"]),
            elements=_share(coverage["elements"]),
            unresolved=_names(coverage["unresolved"]),
            silent=_names(coverage["silent"]),
        ),
        identity=AuditIdentity(**identity),
        seconds=took,
        provenance=_texts(last["provenance"], 100, 1000),
        limits=tuple(clean(str(text)) for text in last["limits"][:MAXIMUM_LIMITS]),
        parts=_texts(last["parts"], 50, 50),
    )


def clean(text: str, limit: int = MAXIMUM_TEXT) -> str:
    """Drop control and direction characters and cap the length of a text that comes from a model."""
    return without_unsafe(text)[:limit]


def _row(values: dict[str, Any]) -> ResultRow:
    if unknown := values.keys() - set(_FIELDS):
        raise ArtifactError(f"a row of the audit has an unknown field {clean(sorted(unknown)[0], 50)!r}")
    row = ResultRow(**{name: _value(name, value) for name, value in values.items()})
    if row.check not in CHECKS:
        raise ArtifactError(f"the audit names a check that does not exist, {clean(row.check, 50)!r}")
    return row


def _value(name: str, value: Any) -> Any:
    """A field's value as its type has it; whatever is not of that type is an error."""
    kind = _KINDS[name]
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and type(None) in kinds:
        return None
    (wanted,) = (k for k in kinds if k is not type(None))
    if wanted in (Outcome, Severity, Lane):
        return wanted(value)
    if wanted is float:
        number = _number(value, finite=False)
        if name in _SIZES and number < 0:
            raise ValueError(f"{name} is negative")
        return number
    if type(value) is not wanted:
        raise TypeError(f"{name} is a {type(value).__name__}")
    if wanted is int and not 0 <= value < (2**15 if name == "step" else 2**63):
        raise ValueError(f"{name} is out of range")
    if wanted is str:
        return clean(value, MAXIMUM_TEXT if name in _SENTENCES else MAXIMUM_NAME)
    return value


def _number(value: Any, *, finite: bool = True) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{type(value).__name__} for a number")
    number = float(value)
    if finite and not math.isfinite(number):
        raise ValueError("a number that is not finite")
    return number


def _names(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or len(values) > MAXIMUM_UNRESOLVED:
        raise ArtifactError(f"the audit names more than {MAXIMUM_UNRESOLVED:,} parameters")
    return tuple(clean(str(name), MAXIMUM_NAME) for name in values)


def _texts(values: Any, key: int, text: int) -> dict[str, str]:
    if len(values) > MAXIMUM_PARTS:
        raise ArtifactError(f"the audit's answer has more than {MAXIMUM_PARTS} parts")
    return {clean(str(k), key): clean(str(v), text) for k, v in values.items()}


def _share(value: Any) -> float:
    share = _number(value)
    if not 0.0 <= share <= 1.0:
        raise ArtifactError(f"the audit's coverage is {share}, not a share from 0 to 1")
    return share
