"""Compaction keeps every audit once, through crashes, reruns and its own repetition."""

from __future__ import annotations

import dataclasses
import datetime
import os
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from audits.errors import InfrastructureError, InputError
from audits.results.compaction import compact, compact_months, ended_months
from audits.results.store import ResultsStore
from tests.audits.results.test_results import TODAY, identity, row, table

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


def test_a_month_is_sorted_by_model_and_parameter_and_takes_late_days_in(store: ResultsStore, tmp_path: Path) -> None:
    for number in range(3):
        day = TODAY - datetime.timedelta(number)
        who = dataclasses.replace(identity(f"b{number}"), model_name="a-model")
        store.write("rows", table([row(parameter="z"), row(parameter="b")], who), date=day, audit_id=f"b{number}")
    before = store.read("rows").num_rows
    assert ended_months(store, today=TOMORROW) == ["2026-01"]
    assert compact_months(store, ["2026-01"], before=TOMORROW) == 8
    assert files(tmp_path) == [path.name for path in (tmp_path / "rows" / "audit_date=2026-01").glob("merged-*")]
    assert [folder.name for folder in (tmp_path / "rows").iterdir()] == ["audit_date=2026-01"]
    raw = pd.read_parquet(tmp_path / "rows")
    keys = list(zip(raw["model_name"], raw["parameter"], raw["audited_at"], strict=True))
    assert keys == sorted(keys)
    assert len(raw) == before == store.read("rows").num_rows
    assert ended_months(store, today=TOMORROW) == []
    assert compact_months(store, ["2026-01"], before=TOMORROW) == 0
    store.write("rows", table([row()], identity("late")), date=TODAY, audit_id="late")
    assert compact_months(store, ["2026-01"], before=TOMORROW) == 2
    assert store.read("rows").num_rows == before + 1


def test_a_month_is_merged_in_ranges_of_models_without_loss(
    store: ResultsStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("audits.results.compaction.CHUNK", 3)
    for number in range(9):
        who = dataclasses.replace(identity(f"c{number}"), model_name=f"n{number % 4}")
        store.write("rows", table([row(parameter="z"), row(parameter=None)], who), date=TODAY, audit_id=f"c{number}")
    before = store.read("rows").sort_by([("audit_id", "ascending"), ("row", "ascending")])
    compact_months(store, ["2026-01"], before=TOMORROW)
    raw = pd.read_parquet(tmp_path / "rows")
    assert list(raw["model_name"]) == sorted(raw["model_name"])
    after = store.read("rows").sort_by([("audit_id", "ascending"), ("row", "ascending")])
    assert after.equals(before)
    footer = pq.read_metadata(next(tmp_path.rglob("merged-*.parquet")))
    assert footer.num_row_groups > 1


def test_a_file_that_was_rewritten_while_it_was_merged_stays(
    store: ResultsStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Path.rename

    def rewritten(self: Path, target: Path) -> Path:
        if self.name == "part-a1.parquet" and not target.name.startswith("part"):
            store.write("rows", table([row(error=77.0)], identity("a1", 40)), date=TODAY, audit_id="a1")
        return original(self, target)

    monkeypatch.setattr(Path, "rename", rewritten)
    assert compact(store, before=TOMORROW) == 4
    frame = store.read("rows").to_pandas()
    assert list(frame[frame.audit_id == "a1"]["error"]) == [77.0]


def test_what_a_killed_compaction_had_in_its_hand_comes_back(store: ResultsStore, tmp_path: Path) -> None:
    part = next(tmp_path.rglob("part-a2.parquet"))
    part.rename(part.with_name(f".taken-{part.name}"))
    assert store.read("rows").num_rows == 8
    compact(store, before=TOMORROW)
    assert store.read("rows").num_rows == 10
    assert list(tmp_path.rglob(".taken-*")) == []


def test_what_a_killed_writer_left_goes_after_a_day(store: ResultsStore, tmp_path: Path) -> None:
    folder = next((tmp_path / "rows").iterdir())
    old, fresh = folder / ".writing-1.tmp", folder / ".writing-2.tmp"
    for path in (old, fresh):
        path.write_bytes(b"half a file")
    os.utime(old, (0, 0))
    compact(store, before=TOMORROW)
    assert [path.name for path in folder.glob(".writing-*")] == [fresh.name]


def test_what_is_no_month_is_refused(store: ResultsStore) -> None:
    with pytest.raises(InputError, match="write it as 2026-10"):
        compact_months(store, ["2026-13"], before=TOMORROW)
