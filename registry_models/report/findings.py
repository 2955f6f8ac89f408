"""Findings for a person: rows of one root cause together, each with the command that repeats it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from audits.checks import CHECKS
from audits.outcomes import Outcome, ResultRow, finite
from audits.report import AuditReport, rerun_options
from audits.wording import as_sentence
from registry_models.report.text import number, times

#: Findings of a root cause that are laid out in full; the others follow as a table.
LAID_OUT = 1

#: Findings a page lists; the rows of an audit with more are in its Parquet file.
LISTED = 2000


@dataclass(frozen=True)
class Finding:
    """One row that is not a pass, with what a person needs to act on it."""

    anchor: str
    row: ResultRow
    command: str
    where_to_look: str

    @property
    def parameter(self) -> str:
        """The parameter's name, or what the row is about instead."""
        return self.row.parameter or (f"phase {self.row.phase}" if self.row.phase else "whole model")

    @property
    def context(self) -> str:
        """Phase, step and lane of the row, in words."""
        row = self.row
        parts = (row.phase and f"phase {row.phase}", row.step is not None and f"step {row.step}",
                 row.lane and f"{row.lane} lane", row.dtype and row.dtype.removeprefix("torch."))  # fmt: skip
        return " · ".join(str(part) for part in parts if part)

    @property
    def judged(self) -> str | None:
        """The error against what is allowed, in words."""
        row = self.row
        if row.error is None:
            return None
        if row.threshold is None:
            return number(row.error, 4)
        factor = times(row.error, row.threshold)
        allowed = f"{number(row.error, 4)}, allowed {number(row.threshold, 4)}"
        return f"{allowed}: {factor} too much" if factor else allowed

    @property
    def sureness(self) -> str | None:
        """How sure the row is: the smallest relative error it would have found."""
        limit = finite(self.row.detection_limit)
        if limit is None:
            return None
        return f"a relative error of {number(limit, 2)} or more would have been found here"


@dataclass(frozen=True)
class FindingGroup:
    """Findings of one root cause.

    Attributes:
        cause: what is wrong, a clause that names it.
        where: the parameters in words.
        checks: the checks that saw it.
        claims: what they claim.
    """

    cause: str
    where: str
    checks: tuple[str, ...]
    outcome: Outcome
    claims: tuple[str, ...]
    where_to_look: str
    findings: tuple[Finding, ...]

    @property
    def title(self) -> str:
        """The cause as a heading."""
        return as_sentence(self.cause)

    @property
    def waived(self) -> bool:
        """Whether somebody answers for one of them."""
        return any(finding.row.waiver for finding in self.findings)

    @property
    def laid_out(self) -> tuple[Finding, ...]:
        """Those shown in full."""
        return self.findings[:LAID_OUT]

    @property
    def others(self) -> tuple[Finding, ...]:
        """Those shown as a table."""
        return self.findings[LAID_OUT:]


def finding_groups(report: AuditReport, rerun: str) -> tuple[list[FindingGroup], int]:
    """Return the findings by root cause, worst first, and how many more rows the page does not list.

    Args:
        report: the audit.
        rerun: the command that repeats it, ``{options}`` in it for what narrows it.
    """
    groups: list[FindingGroup] = []
    index = 0
    for root in report.root_findings:
        findings = []
        for row in root.rows[: max(0, LISTED - index)]:
            command = rerun.format(options=rerun_options(row)).strip()
            findings.append(Finding(f"finding-{index}", row, command, _advice(row)))
            index += 1
        if findings:
            claims = tuple(CHECKS[check].claim if check in CHECKS else "" for check in root.checks)
            groups.append(FindingGroup(root.cause, root.where, root.checks, root.outcome, claims, _shared(findings),
                                       tuple(findings)))  # fmt: skip
    return groups, max(0, len(report.findings) - index)


def _advice(row: ResultRow) -> str:
    """Return the row's advice without the sentence that only repeats its parameter and module."""
    return (row.where_to_look or "").replace(f"{row.parameter} is held by {row.module}.", "").replace("  ", " ").strip()


def _shared(findings: Sequence[Finding]) -> str:
    """Return the advice that all findings of a group have in common, or nothing."""
    advice = {finding.where_to_look for finding in findings}
    return advice.pop() if len(advice) == 1 else ""
