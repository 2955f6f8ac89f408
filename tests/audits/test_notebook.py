"""What a notebook shows of a report: findings, waivers, what was not checked; nothing that a name could run."""

from __future__ import annotations

import dataclasses

from audits.outcomes import Outcome
from tests.registry_models.report.synthetic import HOSTILE, report_of


def test_the_cell_says_what_failed_what_is_waived_and_what_was_not_checked() -> None:
    report = report_of(12, failing=(3, 7), inconclusive=(5,))
    rows = list(report.rows)
    waived = next(i for i, row in enumerate(rows) if row.outcome is Outcome.FAIL)
    rows[waived] = dataclasses.replace(rows[waived], waiver="known (anna, until 2026-12-31)")
    text = dataclasses.replace(report, rows=tuple(rows))._repr_html_()
    failed = next(row for row in report.findings if row.parameter != rows[waived].parameter)
    assert f"<code>{failed.parameter}</code>" in text
    assert "<strong>Waived:</strong> known (anna, until 2026-12-31)" in text
    assert "the recipe declares no clipping" in text
    assert "Not covered" in text
    assert 'scope="col"' in text, "headings a screen reader can name"
    assert "<script" not in text
    assert "<style" not in text, "a cell must not restyle the notebook"


def test_names_are_escaped() -> None:
    text = report_of(len(HOSTILE), names=list(HOSTILE), failing=(0, 1, 2))._repr_html_()
    assert "<script>" not in text
    assert "<img" not in text
    assert "&lt;script&gt;" in text
