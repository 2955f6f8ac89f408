"""SQL over the store: committed audits, each once, whatever a crash left; and nothing but the store."""

from __future__ import annotations

import datetime
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from audits.errors import InputError
from audits.history.parameter_history import by_parameter, history
from audits.outcomes import Outcome
from audits.results.compaction import compact, compact_months
from audits.results.queries import query
from audits.results.store import ResultsStore
from tests.audits.results.committing import DAY, commit, report, row, store_rows

NEXT = DAY + datetime.timedelta(1)


@pytest.fixture
def store(tmp_path: Path) -> ResultsStore:
    return ResultsStore(tmp_path / "results")


def errors(store: ResultsStore) -> list[float]:
    return sorted(query(store, "SELECT error FROM rows").column("error").to_pylist())


def test_an_empty_store_has_empty_views(store: ResultsStore) -> None:
    for view in ("rows", "audits", "failures"):
        assert query(store, f"SELECT * FROM {view}").num_rows == 0


def test_views_have_the_columns_of_the_format_and_the_day(store: ResultsStore) -> None:
    commit(store, report(row("fail", error=0.5), row("pass", "v")))
    found = query(store, "SELECT model_name, parameter, audit_date FROM failures").to_pylist()
    assert found == [{"model_name": "m", "parameter": "w", "audit_date": DAY}]
    assert query(store, "SELECT parts['optimizer'] AS o, n_fail FROM audits").to_pylist() == [{"o": "o", "n_fail": 1}]
    assert query(store, "FROM rows WHERE parameter = $p", {"p": "v"}).num_rows == 1


def test_an_older_file_without_a_column_is_read_with_nulls(store: ResultsStore, tmp_path: Path) -> None:
    commit(store, report(row("fail")))
    path = next((tmp_path / "results" / "rows").rglob("*.parquet"))
    pq.write_table(pq.read_table(path, partitioning=None).drop_columns(["where_to_look"]), path)
    commit(store, report(row("fail", where_to_look="there"), version=2))
    places = query(store, "SELECT where_to_look FROM rows ORDER BY model_version").column("where_to_look").to_pylist()
    assert places == [None, "there"]


def test_rows_without_a_commit_are_not_shown_and_the_newest_writing_counts(store: ResultsStore) -> None:
    store_rows(store, report(row("pass", error=1.0), audit_id="a"))
    assert errors(store) == []
    commit(store, report(row("pass", error=2.0), audit_id="a", day=NEXT))
    assert errors(store) == [2.0], "the writing of the day before was never committed"
    commit(store, report(row("pass", error=3.0), audit_id="a", day=NEXT, hour=4))
    assert errors(store) == [3.0]
    store_rows(store, report(row("pass", error=4.0), audit_id="a", day=NEXT, hour=5))
    assert errors(store) == [4.0], "a second worker wrote its rows over the first's and was killed: nothing is lost"
    assert query(store, "FROM audits").num_rows == 1


@pytest.mark.parametrize("month", [False, True])
def test_a_compaction_that_broke_doubles_and_hides_nothing(store: ResultsStore, tmp_path: Path, month: bool) -> None:
    commit(store, report(row("fail", error=1.0), row("pass", "v", error=2.0)))
    commit(store, report(row("pass", error=3.0), model="other"))
    store_rows(store, report(row("pass", error=9.0), audit_id="late"))
    commit(store, report(row("pass", error=4.0), audit_id="late", day=DAY, hour=8))
    shutil.copytree(tmp_path / "results", tmp_path / "before")
    merge = (
        (lambda: compact_months(store, ["2026-01"], before=NEXT)) if month else (lambda: compact(store, before=NEXT))
    )
    assert merge() == 6
    assert errors(store) == [1.0, 2.0, 3.0, 4.0]
    shutil.copytree(tmp_path / "before", tmp_path / "results", dirs_exist_ok=True)  # killed before the small files went
    assert errors(store) == [1.0, 2.0, 3.0, 4.0]
    assert query(store, "FROM audits").num_rows == 3
    assert merge() == 8
    assert len(list((tmp_path / "results").rglob("*.parquet"))) == 2
    assert errors(store) == [1.0, 2.0, 3.0, 4.0]


def test_days_are_left_out_even_of_a_merged_month(store: ResultsStore) -> None:
    first = DAY.replace(day=1)
    commit(store, report(row("fail", error=1.0), day=first))
    commit(store, report(row("fail", error=2.0), day=DAY))
    compact_months(store, ["2026-01"], before=NEXT)
    found = query(store, "SELECT error FROM failures", since=DAY).column("error").to_pylist()
    assert found == [2.0]
    assert query(store, "FROM audits", until=first).num_rows == 1


def test_another_filesystem_is_read_through_arrow(store: ResultsStore, tmp_path: Path) -> None:
    commit(store, report(row("fail", error=1.0)))
    commit(store, report(row("pass", error=2.0), day=NEXT))
    compact(store, before=NEXT)
    other = ResultsStore(tmp_path)
    other._filesystem, other._path = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()), "results"
    assert other.local_folder is None
    assert errors(other) == [1.0, 2.0]
    assert other.read("rows").num_rows == 2


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("SELECT nothing FROM rows", '"nothing" not found'),
        ("SELEC 1", "syntax error"),
        ("FROM row", "Did you mean"),
        ("COPY rows TO '{folder}/results/rows/x.parquet'", "one statement that reads"),
        ("SELECT 1; SELECT 2", "one statement that reads"),
        ("EXPLAIN ANALYZE SELECT 1", "one statement that reads"),
        ("SET enable_external_access = true", "one statement that reads"),
        ("CREATE TABLE x AS SELECT 1", "one statement that reads"),
        ("ATTACH '{folder}/x.db'", "one statement that reads"),
        ("FROM read_csv('{folder}/secret.csv')", "Cannot access file"),
        ("FROM '{folder}/secret.csv'", "secret.csv"),
        ("FROM read_parquet('{folder}/results/../other.parquet')", "Cannot access file"),
        ("FROM glob('{folder}/*')", "Cannot access file"),
        ("FROM secret", "secret"),
    ],
)
def test_what_is_not_a_question_to_the_store_is_refused(
    store: ResultsStore, tmp_path: Path, sql: str, words: str
) -> None:
    secret = commit(store, report(row("fail"))).to_table()  # a Python variable that no query may see
    (tmp_path / "secret.csv").write_text("password\nhunter2\n")
    pq.write_table(secret, tmp_path / "other.parquet")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError) as refused:
        query(store, sql.format(folder=tmp_path))
    assert words in str(refused.value)
    assert "views: rows (" in str(refused.value)
    assert "hunter2" not in str(refused.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_that_is_allowed_in_the_store_is_readable_and_others_are_not(
    store: ResultsStore, tmp_path: Path
) -> None:
    """The control: the same reader works inside the store, so the refusals above are refusals."""
    commit(store, report(row("fail")))
    inside = next((tmp_path / "results" / "rows").rglob("*.parquet"))
    assert query(store, f"FROM read_parquet('{inside}')").num_rows == 1


def test_history_tells_since_when_a_parameter_fails(store: ResultsStore) -> None:
    days = [DAY + datetime.timedelta(n) for n in range(5)]
    for day, outcome in zip(days, ("pass", "pass", "fail", "inconclusive", "fail"), strict=True):
        commit(store, report(row(outcome, error=0.5), row("pass", check="update.state"), row("pass", "v"), day=day))
    found = history(store, "m", parameter="w")
    assert [m.outcome for m in found] == [Outcome(o) for o in ("pass", "pass", "fail", "inconclusive", "fail")]
    assert {(m.check, m.checks) for m in found} == {("update.rule", 2)}
    story = by_parameter(history(store, "m"))
    assert [s.parameter for s in story] == ["w", "v"]
    assert story[0].failing_since is not None
    assert story[0].before_failing is not None
    assert story[0].failing_since.audited_at.date() == days[2]
    assert story[0].before_failing.audited_at.date() == days[1]
    assert story[1].failing_since is None
    assert len(history(store, "m", parameter="[vw]", check="update.s*")) == 5
    assert history(store, "m", parameter="w'; DROP VIEW rows; --") == []
    assert len(history(store, "m", since=days[3])) == 4
