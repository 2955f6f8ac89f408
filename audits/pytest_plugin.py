"""The fixture ``audit`` of pytest: ``assert audit(model, recipe).passed``, with the findings where the test failed.

pytest loads this module wherever gradaudit is installed: it imports no torch, which the first audit does.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from audits.report import AuditReport

#: The reports of one test, in the order of its audits.
_REPORTS = pytest.StashKey[list["AuditReport"]]()


@pytest.fixture
def audit(request: pytest.FixtureRequest) -> Callable[..., AuditReport]:
    """Audit a model as its recipe says, with the arguments of ``audits.audit``; a failed test shows the findings."""
    reports = request.node.stash.setdefault(_REPORTS, [])

    def run(model: Any, recipe: Any, **options: Any) -> AuditReport:
        import audits

        report = audits.audit(model, recipe, **options)
        reports.append(report)
        return report

    return run


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add what does not pass to the report of a failed test."""
    made = yield
    if made.failed and made.when == "call":
        for report in item.stash.get(_REPORTS, []):
            if not report.passed:
                made.sections.append(("gradaudit", readable(report)))
    return made


def readable(report: AuditReport) -> str:
    """Return the verdict, and of each root finding that keeps it from passing cause, checks and where to look."""
    lines = [report.headline]
    for found in report.root_findings:
        if found.outcome in ("fail", "inconclusive"):
            row = found.rows[0]
            lines += ["", f"{found.outcome}: {found.text}", f"  seen by {', '.join(found.checks)}: {row.message}"]
            lines += [f"  {row.where_to_look}"] if row.where_to_look else []
    return "\n".join(lines)
