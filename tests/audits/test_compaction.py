"""Compaction keeps every audit once, through crashes, reruns and its own repetition."""

from __future__ import annotations

import datetime
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from audits.compaction import compact
from audits.errors import InfrastructureError
from audits.results import ResultsStore
from tests.audits.test_results import TODAY, identity, row, table

TOMORROW = TODAY + datetime.timedelta(1)


@pytest.fixture
def store(tmp_path: Path) -> ResultsStore:
    made = ResultsStore(tmp_path)
    for number in range(5):
        rows = [row(parameter=name, error=float(number)) for name in ("w", "a")]
        made.write("rows", table(rows, identity(f"a{number}", number)), date=TODAY, audit_id=f"a{number}")
    return made


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.parquet"))


def test_a_day_becomes_one_sorted_file_with_the_same_rows(store: ResultsStore, tmp_path: Path) -> None:
    before = store.read("rows").to_pandas().sort_values(["audit_id", "row"]).reset_index(drop=True)
    assert compact(store, before=TOMORROW) == 5
    assert len(files(tmp_path)) == 1
    after = store.read("rows").to_pandas().sort_values(["audit_id", "row"]).reset_index(drop=True)
    pd.testing.assert_frame_equal(before, after)
    raw = pd.read_parquet(tmp_path / "rows")
    assert list(raw["parameter"]) == sorted(raw["parameter"])
    assert pq.read_schema(next(tmp_path.rglob("*.parquet"))).metadata[b"schema_version"] == b"1"
    assert compact(store, before=TOMORROW) == 0


def test_today_is_left_alone(store: ResultsStore, tmp_path: Path) -> None:
    assert compact(store, before=TODAY) == 0
    assert len(files(tmp_path)) == 5


def test_a_retry_after_compaction_replaces_its_rows(store: ResultsStore, tmp_path: Path) -> None:
    compact(store, before=TOMORROW)
    store.write("rows", table([row(error=9.0)], identity("a1", 30)), date=TODAY, audit_id="a1")
    frame = store.read("rows").to_pandas()
    assert list(frame[frame.audit_id == "a1"]["error"]) == [9.0]
    compact(store, before=TOMORROW)
    assert len(pd.read_parquet(tmp_path / "rows")) == 9


def test_a_crash_before_the_small_files_go_is_healed(
    store: ResultsStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(self: Path, missing_ok: bool = False) -> None:
        raise OSError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", crash)
        with pytest.raises(InfrastructureError):
            compact(store, before=TOMORROW)
    assert len(files(tmp_path)) == 6
    assert store.read("rows").num_rows == 10, "readers see each audit once"
    assert compact(store, before=TOMORROW) == 6
    assert len(pd.read_parquet(tmp_path / "rows")) == 10


def test_an_older_file_without_a_column_is_read_with_nulls(store: ResultsStore, tmp_path: Path) -> None:
    path = next(tmp_path.rglob("part-a0.parquet"))
    pq.write_table(pq.read_table(path, partitioning=None).drop_columns(["where_to_look"]), path)
    compact(store, before=TOMORROW)
    assert "where_to_look" in pd.read_parquet(tmp_path / "rows").columns
