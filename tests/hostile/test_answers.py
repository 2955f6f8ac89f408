"""Forged answers: whatever a child leaves in its folder, the parent says 'bad answer' and stays small and alive."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from audits.errors import ArtifactError
from audits.result_format import ANSWER_SCHEMA, answer_table
from audits.run import refused
from flows.sandbox.answer_file import read_untrusted, refuse_inflated
from registry_models.answer import ROWS_FILE, SUMMARY_FILE, clean, read_answer, write_answer


@pytest.fixture
def answer(tmp_path: Path) -> Path:
    """An honest answer, to be forged."""
    write_answer(refused("no reason"), tmp_path)
    return tmp_path


def summary(folder: Path, **changes: Any) -> None:
    held = json.loads((folder / SUMMARY_FILE).read_text())
    (folder / SUMMARY_FILE).write_text(json.dumps({**held, **changes}))


def write_rows(folder: Path, table: pa.Table, **options: Any) -> None:
    written = pa.ipc.IpcWriteOptions(**options)
    with pa.OSFile(str(folder / ROWS_FILE), "wb") as sink, pa.ipc.new_file(sink, table.schema, options=written) as out:
        out.write_table(table)


def empty_rows(count: int) -> pa.Table:
    """Rows that take no room once compressed."""
    columns = []
    for field in ANSWER_SCHEMA:
        zeros = pa.py_buffer(np.zeros(count + 1, dtype=np.int64))
        text = pa.types.is_string(field.type)
        buffers = [None, zeros, pa.py_buffer(b"")] if text else [None, zeros]
        columns.append(pa.Array.from_buffers(field.type, count, buffers))
    return pa.Table.from_arrays(columns, schema=ANSWER_SCHEMA)


def wrong_schema(folder: Path) -> None:
    write_rows(folder, pa.table({"check": ["gradient.finite-difference"], "outcome": ["pass"]}))


def many_rows(folder: Path) -> None:
    write_rows(folder, empty_rows(1_000_001).slice(0, 1_000_001))


def compressed(folder: Path) -> None:
    write_rows(folder, empty_rows(500_000), compression="zstd")


def unknown_outcome(folder: Path) -> None:
    table = answer_table(refused("x").rows).to_pylist()
    write_rows(folder, pa.Table.from_pylist([{**table[0], "outcome": "splendid"}], ANSWER_SCHEMA))


def no_arrow(folder: Path) -> None:
    (folder / ROWS_FILE).write_bytes(b"ARROW1\0\0" + os.urandom(4096) + b"ARROW1")


def truncated(folder: Path) -> None:
    content = (folder / ROWS_FILE).read_bytes()
    (folder / ROWS_FILE).write_bytes(content[: len(content) // 2])


def huge_sparse(folder: Path) -> None:
    os.truncate(folder / ROWS_FILE, 2**40)


def link(folder: Path) -> None:
    (folder / ROWS_FILE).rename(folder / "elsewhere")
    (folder / ROWS_FILE).symlink_to(folder / "elsewhere")


def pipe_in_its_place(folder: Path) -> None:
    (folder / SUMMARY_FILE).unlink()
    os.mkfifo(folder / SUMMARY_FILE)


def folder_in_its_place(folder: Path) -> None:
    (folder / ROWS_FILE).unlink()
    (folder / ROWS_FILE).mkdir()


def summary_of_lists(folder: Path) -> None:
    (folder / SUMMARY_FILE).write_text("[" * 200_000 + "]" * 200_000)


def summary_too_large(folder: Path) -> None:
    (folder / SUMMARY_FILE).write_text(json.dumps({"x": "x" * (9 << 20)}))


def pickle_for_summary(folder: Path) -> None:
    (folder / SUMMARY_FILE).write_bytes(b"\x80\x04c__builtin__\neval\n.")


FORGERIES: list[Callable[[Path], Any]] = [
    wrong_schema, many_rows, compressed, unknown_outcome, no_arrow, truncated, huge_sparse, link, pipe_in_its_place,
    folder_in_its_place, summary_of_lists, summary_too_large, pickle_for_summary,
    lambda folder: (folder / SUMMARY_FILE).unlink(),
    lambda folder: summary(folder, coverage={"tensors": 2.0, "elements": 1.0, "unresolved": []}),
    lambda folder: summary(folder, coverage={"tensors": float("nan"), "elements": 1.0, "unresolved": []}),
    lambda folder: summary(folder, seconds=10**400),
    lambda folder: summary(folder, provenance=["not", "a", "mapping"]),
    lambda folder: summary(folder, parts=["not", "a", "mapping"]),
    lambda folder: summary(folder, parts={f"part-{i}": "digest" for i in range(30)}),
]  # fmt: skip


def test_control_the_honest_answer_is_read(answer: Path) -> None:
    assert read_untrusted(answer).headline == read_answer(answer).headline


@pytest.mark.parametrize("forge", FORGERIES, ids=lambda forge: forge.__name__.strip("<>"))
def test_a_forged_answer_is_refused(answer: Path, forge: Callable[[Path], Any]) -> None:
    forge(answer)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ArtifactError):
        read_untrusted(answer)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 400, "MiB: the parent stays small"


def test_compressed_rows_are_refused_from_their_description(answer: Path) -> None:
    """Witness: the file is small, what it unfolds to is not."""
    compressed(answer)
    assert (answer / ROWS_FILE).stat().st_size < 100_000
    with pytest.raises(ArtifactError, match="compressed"):
        refuse_inflated(answer / ROWS_FILE)


def test_a_batch_named_again_and_again_is_refused(answer: Path) -> None:
    """The footer's list of batches is what a reader follows: here the second entry is a copy of the first."""
    path = answer / ROWS_FILE
    table = answer_table(refused("x" * 1000).rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, ANSWER_SCHEMA) as out:
        out.write_table(table)
        out.write_table(table)
    content = bytearray(path.read_bytes())
    with pa.ipc.open_file(path) as reader:
        assert reader.num_record_batches == 2
    refuse_inflated(path)
    # Entries are (offset, length of description, length of body): make the first as long as the whole file.
    footer = len(content) - 10 - int.from_bytes(content[-10:-6], "little")
    first = content.index((1).to_bytes(1, "little"), footer)
    for at in range(footer, len(content) - 34, 4):
        offset, described = (
            int.from_bytes(content[at : at + 8], "little"),
            int.from_bytes(content[at + 8 : at + 12], "little"),
        )
        if 0 < offset < len(content) and content[offset : offset + 4] == b"\xff" * 4 and 0 < described < 5000:
            content[at + 16 : at + 24] = len(content).to_bytes(8, "little")
            break
    else:
        pytest.fail(f"no entry found after {first}")
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="more than their file holds"):
        refuse_inflated(path)


def test_texts_lose_control_and_direction_characters() -> None:
    text = "\x1b]8;;http://x\x07<b>\u202eevil\u2066\x9b31m\x00\r" + "x" * 5000
    cleaned = clean(text)
    assert cleaned.startswith("]8;;http://x<b>evil31m")
    assert len(cleaned) == 2000
