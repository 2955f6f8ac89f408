"""What is remembered of versions that were looked at: read once, merged when there are many files, never lost."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from audits.errors import InfrastructureError
from audits.results.kinds import FOLDER, MOST_FILES, Kind, Kinds
from audits.results.store import ResultsStore

DAY = datetime.datetime(2026, 11, 27, tzinfo=datetime.UTC)


def kind(key: str, outside: str = "sklearn", day: int = 0) -> Kind:
    return Kind(key, "m\n1", 3, outside, outside and f"a model of {outside}", DAY + datetime.timedelta(days=day))


def test_what_one_process_remembers_another_knows(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path / "results")
    here, there = Kinds(store), Kinds(store)
    assert there.refresh().of("a") is None, "without a store there is nothing"
    here.refresh().remember([kind("a"), kind("b", "")])
    assert there.of("a") is None, "until it looks"
    assert there.refresh().of("a") == kind("a")
    assert there.of("b") == kind("b", "")
    here.remember([])
    assert len(store.names_beside(FOLDER)) == 1


def test_the_first_look_is_the_date(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path)
    Kinds(store).remember([kind("a", day=3)])
    Kinds(store).remember([kind("a", day=1)])
    found = Kinds(store).refresh().of("a")
    assert found is not None
    assert found.decided_at == DAY + datetime.timedelta(days=1)


def test_what_an_audit_told_stands_over_the_look_before_it(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path)
    for order in ("ab", "ba"):  # whichever is written first
        for letter in order:
            later = kind(order, "nothing to train", day=2) if letter == "b" else kind(order, "", day=1)
            Kinds(store).refresh().remember([later])
        found = Kinds(store).refresh().of(order)
        assert found is not None
        assert found.outside == "nothing to train"


def test_many_small_files_become_one(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path)
    here, there = Kinds(store), Kinds(store)
    for number in range(MOST_FILES + 1):
        (here if number % 2 else there).remember([kind(f"k{number}")])
    assert len(store.names_beside(FOLDER)) == 1, "the last one merged what the other had written too"
    late = Kinds(store).refresh()
    assert all(late.of(f"k{number}") == kind(f"k{number}") for number in range(MOST_FILES + 1))
    assert all(here.refresh().of(f"k{number}") for number in range(MOST_FILES + 1))


def test_a_damaged_file_is_the_stores_trouble(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path)
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "part-1.parquet").write_bytes(b"no parquet")
    with pytest.raises(InfrastructureError, match=r"kinds cannot be read"):
        Kinds(store).refresh()
