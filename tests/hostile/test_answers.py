"""Forged answers: whatever a child sends, the parent says 'bad answer' and stays small and alive."""

from __future__ import annotations

import io
import json
import math
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from audits.errors import ArtifactError
from audits.outcomes import Lane, Outcome, ResultRow, Severity
from audits.report import AuditReport
from audits.run import refused
from registry_models.child.answer import MAXIMUM_BYTES, MAXIMUM_ROWS, clean, read_answer, write_answer

pytestmark = pytest.mark.slow


@pytest.fixture
def answer(tmp_path: Path) -> Path:
    """An honest answer, to be forged."""
    path = tmp_path / "answer.jsonl"
    with path.open("wb") as stream:
        write_answer(refused("no reason"), stream)
    return path


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def written(path: Path, lines: list[Any]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def row(path: Path, **changes: Any) -> None:
    first, last = lines_of(path)
    written(path, [{**first, **changes}, last])


def last(path: Path, **changes: Any) -> None:
    first, end = lines_of(path)
    written(path, [first, {**end, **changes}])


def many_rows(path: Path) -> None:
    first, end = path.read_bytes().splitlines(keepends=True)
    with path.open("wb") as stream:
        for _ in range(MAXIMUM_ROWS + 1):
            stream.write(first)
        stream.write(end.replace(b'"answered": 1', b'"answered": %d' % (MAXIMUM_ROWS + 1)))


def noise(path: Path) -> None:
    path.write_bytes(os.urandom(4096) + b"\n")


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def without_an_end(path: Path) -> None:
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])


def twice(path: Path) -> None:
    path.write_bytes(path.read_bytes() * 2)


def huge_sparse(path: Path) -> None:
    os.truncate(path, MAXIMUM_BYTES + 1)


def one_long_line(path: Path) -> None:
    path.write_bytes(b"[" + b"0," * (20 << 20) + b"0]\n")


def nested(path: Path) -> None:
    path.write_text("[" * 200_000 + "]" * 200_000 + "\n")


def pickled(path: Path) -> None:
    path.write_bytes(b"\x80\x04c__builtin__\neval\n.\n")


def nothing(path: Path) -> None:
    path.write_bytes(b"")


FORGERIES: list[Callable[[Path], Any]] = [
    many_rows, noise, truncated, without_an_end, twice, huge_sparse, one_long_line, nested, pickled, nothing,
    lambda path: row(path, outcome="splendid"),
    lambda path: row(path, check="x" * 1500),
    lambda path: row(path, check="gradient.invented"),
    lambda path: row(path, unknown=1),
    lambda path: row(path, message=["a", "list"]),
    lambda path: row(path, measured="1"),
    lambda path: row(path, measured=10**400),
    lambda path: row(path, step=2**40),
    lambda path: row(path, numel=-1),
    lambda path: row(path, seed=2**64),
    lambda path: row(path, lane="nowhere"),
    lambda path: last(path, coverage={"tensors": 2.0, "elements": 1.0, "unresolved": [], "silent": []}),
    lambda path: last(path, coverage={"tensors": math.nan, "elements": 1.0, "unresolved": [], "silent": []}),
    lambda path: last(path, coverage={"tensors": 1.0, "elements": 1.0, "unresolved": ["x"] * 300_000, "silent": []}),
    *(
        lambda path, seconds=seconds: last(path, seconds=seconds)
        for seconds in (10**400, math.inf, math.nan, "1e400", 1.7e308, -5, True, 31.0)
    ),
    lambda path: last(path, answered=2),
    lambda path: last(path, provenance=["not", "a", "mapping"]),
    lambda path: last(path, provenance={str(i): "x" for i in range(1000)}),
    lambda path: last(path, parts=["not", "a", "mapping"]),
    lambda path: last(path, parts={f"part-{i}": "digest" for i in range(30)}),
]  # fmt: skip


def test_control_the_honest_answer_is_read_as_it_was(tmp_path: Path) -> None:
    full = ResultRow(
        check="update.rule", outcome=Outcome.FAIL, severity=Severity.WARN, phase="step", step=2, lane=Lane.FLOAT64,
        parameter="w", module="Linear (first)", numel=6, dtype="float32", measured=0.5, expected=0.25, error=math.inf,
        threshold=4.0, detection_limit=1e-6, parameter_norm=1.0, gradient_norm=2.0, update_norm=3.0, seed=7,
        cause="lr times 2", message="it did not move", where_to_look="there", waiver="w1",
    )  # fmt: skip
    assert all(value is not None for value in vars(full).values()), "every field travels"
    report = refused("no reason")
    sent = AuditReport(rows=(full, *report.rows), coverage_of=report.coverage_of, identity=report.identity, seconds=3.0)
    with (tmp_path / "answer.jsonl").open("wb") as stream:
        write_answer(sent, stream)
    got = read_answer(tmp_path / "answer.jsonl", seconds=30.0)
    assert (got.rows, got.coverage_of, got.seconds, got.headline) == (
        sent.rows,
        sent.coverage_of,
        sent.seconds,
        sent.headline,
    )


@pytest.mark.parametrize("forge", FORGERIES, ids=lambda forge: forge.__name__.strip("<>"))
def test_a_forged_answer_is_refused(answer: Path, forge: Callable[[Path], Any]) -> None:
    forge(answer)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ArtifactError):
        read_answer(answer, seconds=30.0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 300, "MiB: the parent stays small"


def test_more_rows_than_an_answer_holds_are_said_by_the_child() -> None:
    report = refused("x")
    stream = io.BytesIO()
    write_answer(AuditReport(rows=report.rows * (MAXIMUM_ROWS + 1), coverage_of=report.coverage_of), stream)
    assert b"narrow it with" in stream.getvalue()


def test_texts_lose_control_and_direction_characters() -> None:
    text = "\x1b]8;;http://x\x07<b>\u202eevil\u2066\x9b31m\x00\r" + "x" * 5000
    cleaned = clean(text)
    assert cleaned.startswith("]8;;http://x<b>evil31m")
    assert len(cleaned) == 2000
