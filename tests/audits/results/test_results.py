"""The result format: schema and page agree, files appear whole, a repeat replaces, readers see each audit once."""

from __future__ import annotations

import datetime
import re
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from audits.errors import InfrastructureError
from audits.outcomes import Coverage, Lane, Outcome, ResultRow, Severity, verdict
from audits.report import AuditReport
from audits.results.format import AUDITS_SCHEMA, ROWS_SCHEMA, AuditIdentity, answer_table, audits_table, rows_table
from audits.results.store import ResultsStore

PAGE = Path(__file__).resolve().parents[3] / "docs" / "reference" / "result_format.md"
TODAY = datetime.date(2026, 1, 31)


def identity(audit_id: str = "a1", minute: int = 0) -> AuditIdentity:
    at = datetime.datetime(2026, 1, 31, 2, minute, tzinfo=datetime.UTC)
    return AuditIdentity(audit_id=audit_id, audited_at=at, model_name="m", model_version=1)


def row(**values: object) -> ResultRow:
    fields = {"check": "update.rule", "outcome": Outcome.PASS, "parameter": "w", "error": 0.5, **values}
    return ResultRow(**fields)  # type: ignore[arg-type]


def table(rows: list[ResultRow], who: AuditIdentity) -> pa.Table:
    return rows_table(answer_table(rows), who)


def test_page_and_schema_agree() -> None:
    documented = re.findall(r"^\| `(\w+)` \| ([^|]+) \| (.+) \|$", PAGE.read_text(), flags=re.MULTILINE)
    documented = [(name, kind.strip("`"), text) for name, kind, text in documented]
    for schema in (ROWS_SCHEMA, AUDITS_SCHEMA):
        for field in schema:
            entry = (field.name, str(field.type), field.metadata[b"description"].decode())
            assert entry in documented, f"docs/reference/result_format.md lacks {entry}"
    known = {field.name for field in [*ROWS_SCHEMA, *AUDITS_SCHEMA]}
    assert {name for name, _, _ in documented} == known


def test_plain_pandas_reads_what_was_written(tmp_path: Path) -> None:
    rows = [row(), row(parameter=None, lane=Lane.FLOAT64, step=2, outcome=Outcome.FAIL, error=float("nan"))]
    ResultsStore(tmp_path).write("rows", table(rows, identity()), date=TODAY, audit_id="a1")
    frame = pd.read_parquet(tmp_path / "rows")
    assert list(frame["outcome"]) == ["pass", "fail"]
    assert set(ROWS_SCHEMA.names) <= set(frame.columns)
    assert list((tmp_path / "rows").rglob("*.tmp")) == []


def test_a_repeat_replaces_its_own_file(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path)
    store.write("rows", table([row(), row()], identity()), date=TODAY, audit_id="a1")
    store.write("rows", table([row()], identity(minute=5)), date=TODAY, audit_id="a1")
    assert store.read("rows").num_rows == 1


def test_readers_see_the_newest_of_one_audit_id_once(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path)
    store.write("rows", table([row(error=1.0), row(error=1.0)], identity()), date=TODAY, audit_id="a1")
    store.write("rows", table([row(error=2.0)], identity(minute=9)), date=TODAY + datetime.timedelta(1), audit_id="a1")
    store.write("rows", table([row(error=3.0)], identity("a2")), date=TODAY, audit_id="a2")
    assert sorted(store.read("rows")["error"].to_pylist()) == [2.0, 3.0]


def test_an_empty_store_reads_as_empty(tmp_path: Path) -> None:
    assert ResultsStore(tmp_path / "none").read("audits", columns=["due_key"]).schema.names == ["due_key"]


def test_an_unwritable_store_is_infrastructure(tmp_path: Path) -> None:
    (tmp_path / "rows").write_text("a file where a folder should be")
    with pytest.raises(InfrastructureError, match=r"cannot be written .* a file stands where a folder must be"):
        ResultsStore(tmp_path).write("rows", table([row()], identity()), date=TODAY, audit_id="a1")


def test_a_crash_while_writing_leaves_nothing_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ResultsStore(tmp_path)

    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("audits.results.store.os.replace", full)
    with pytest.raises(InfrastructureError, match="no space is left"):
        store.write("rows", table([row()], identity()), date=TODAY, audit_id="a1")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_committed_line_round_trips(tmp_path: Path) -> None:
    line = audits_table(
        identity(),
        outcome="pass",
        coverage=1.0,
        coverage_elements=1.0,
        n_pass=3,
        n_warn=0,
        n_fail=0,
        n_inconclusive=0,
        n_skipped=1,
        seconds=2.5,
        run_id="r",
        fingerprint="f",
        due_key="k",
        occasion="o",
        message="PASS",
    )
    store = ResultsStore(tmp_path)
    store.write("audits", line, date=TODAY, audit_id="a1")
    assert store.read("audits", columns=["due_key", "n_pass"]).to_pylist() == [{"due_key": "k", "n_pass": 3}]


REQUIRED = [row(check="registration.coverage", parameter=None), row(check="gradient.finite-difference"), row()]
FULL = Coverage(tensors=1.0, elements=1.0, unresolved=())


def test_the_verdict_follows_the_rules() -> None:
    assert verdict(REQUIRED, FULL) is Outcome.PASS
    assert verdict([*REQUIRED, row(outcome=Outcome.FAIL)], FULL) is Outcome.FAIL
    assert verdict([*REQUIRED, row(outcome=Outcome.FAIL, severity=Severity.WARN)], FULL) is Outcome.WARN
    assert verdict([*REQUIRED, row(outcome=Outcome.WARN)], FULL) is Outcome.WARN
    assert verdict(REQUIRED, Coverage(tensors=0.94, elements=1.0, unresolved=("b",))) is Outcome.INCONCLUSIVE
    assert verdict(REQUIRED[1:], FULL) is Outcome.INCONCLUSIVE, "no family may be missing"
    assert verdict([], FULL) is Outcome.INCONCLUSIVE
    assert verdict([*REQUIRED[:2], row(outcome=Outcome.SKIPPED)], FULL) is Outcome.INCONCLUSIVE, "skipped is no pass"


def test_coverage_needs_gradient_and_update_from_declared_fields() -> None:
    rows = [row(check="gradient.finite-difference"), row(), row(check="gradient.finite-difference", parameter="v")]
    trainable = {"w": 3, "v": 1}
    covered = Coverage.of(rows, trainable)
    assert (covered.tensors, covered.elements, covered.unresolved) == (0.5, 0.75, ("v",))
    assert Coverage.of(rows, trainable, frozenset({"optimizer"})).tensors == 0.0
    assert Coverage.of(rows, {}).tensors == 0.0
    unclear = [row(check="gradient.finite-difference"), row(outcome=Outcome.INCONCLUSIVE)]
    assert Coverage.of(unclear, {"w": 3}).tensors == 0.0


@given(st.lists(st.sampled_from(list(Outcome)), max_size=12))
def test_a_report_counts_every_row_and_orders_findings_worst_first(outcomes: list[Outcome]) -> None:
    report = AuditReport(rows=tuple(row(outcome=o) for o in outcomes), coverage_of=FULL)
    assert sum(report.counts.values()) == len(outcomes)
    found = [finding.outcome for finding in report.findings]
    assert found == sorted(found, key=[Outcome.FAIL, Outcome.INCONCLUSIVE, Outcome.WARN].index)
    assert len(found) == sum(1 for o in outcomes if o not in (Outcome.PASS, Outcome.SKIPPED))


def test_the_batch_is_no_parameter_and_reasons_are_said_once() -> None:
    skipped = {"check": "step.clipping", "outcome": Outcome.SKIPPED, "cause": "canonical step"}
    rows = (
        row(check="gradient.input", parameter="<batch x>", outcome=Outcome.FAIL),
        row(outcome=Outcome.FAIL),
        row(**skipped, parameter="a", message="ours"),
        row(**skipped, parameter="b", message="ours"),
    )
    report = AuditReport(rows=rows, coverage_of=FULL)
    assert report.failed_parameters == ["w"]
    assert report.not_checked == [{"check": "step.clipping", "reason": "ours (a, b)"}]
