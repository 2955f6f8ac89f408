"""What `audits.audit` returns."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from audits.causes import Cause
from audits.checks.version import RECIPE_DECLARED
from audits.findings.root_causes import BATCH_PREFIX, RootFinding, in_one_line, root_findings
from audits.findings.skipped import not_checked
from audits.naming import shell_words
from audits.outcomes import (
    WORST_FIRST,
    Coverage,
    Outcome,
    ResultRow,
    decisive,
    finite,
    narrow_verdict,
    open_claims,
    verdict,
)
from audits.results.identity import AuditIdentity
from audits.wording import and_more, listed

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

#: Checks with findings that a printed report shows.
SUMMARY_LINES = 6

#: Where a headline goes on with how much was looked at.
_COVERED = re.compile(r"; (?:\d+% of the trainable parameters covered|only what was asked for was looked at)\.")

#: Version of `AuditReport.to_dict`.
JSON_SCHEMA = 1


@dataclass(frozen=True)
class AuditReport:
    """One audit's rows and what follows from them.

    Attributes:
        rows: one `ResultRow` per phase, step, lane, check and parameter.
        coverage_of: coverage by tensors and by elements, and the unresolved parameters.
        identity: what was audited, when and where.
        seconds: duration of the audit's own work.
        provenance: recipe field -> ``declared`` or ``assumed``, and where.
        limits: sentences about what this audit could not see; the headline ends with them.
        parts: digest of each part that a verdict depends on (weights, files, sources, loss, optimizer, state, batch,
            step, options): what tells apart why two audits differ.
        waivers: ids of the waivers that excuse a finding.
        narrowed: only some checks or parameters were looked at; coverage says nothing then.
    """

    rows: tuple[ResultRow, ...]
    coverage_of: Coverage
    identity: AuditIdentity = field(default_factory=AuditIdentity)
    seconds: float = 0.0
    provenance: Mapping[str, str] = field(default_factory=dict)
    run_id: str | None = None
    limits: tuple[str, ...] = ()
    parts: Mapping[str, str] = field(default_factory=dict)
    waivers: tuple[str, ...] = ()
    narrowed: bool = False

    @property
    def outcome(self) -> Outcome:
        """The version's outcome; of a narrowed audit, what its rows say."""
        return narrow_verdict(self.rows) if self.narrowed else verdict(self.rows, self.coverage_of)

    @property
    def passed(self) -> bool:
        """Whether the version passes, with warnings or without: what exit code 0 says."""
        return self.outcome in (Outcome.PASS, Outcome.WARN)

    @property
    def coverage(self) -> float:
        """Share of the trainable parameters whose gradient and update were resolved, 0 to 1."""
        return self.coverage_of.tensors

    @property
    def findings(self) -> list[ResultRow]:
        """What fails, warns or could not be judged, worst first: the rows of ``--json``'s ``findings``.

        What was not looked at is in `not_checked`, and every row in `rows`.
        """
        found = [row for row in self.rows if row.outcome not in (Outcome.PASS, Outcome.SKIPPED)]
        return sorted(found, key=lambda row: (WORST_FIRST.index(row.counted), row.outcome is not Outcome.FAIL))

    @property
    def root_findings(self) -> list[RootFinding]:
        """What fails, warns or could not be judged, the rows of one root cause together, worst first."""
        return root_findings(self.rows)

    @property
    def causes(self) -> list[str]:
        """What the verdict rests on, a clause each, the cause first; empty where everything holds."""
        outcome = self.outcome
        if outcome is Outcome.INCONCLUSIVE:
            return [self._why_unclear]
        if outcome is Outcome.PASS:
            return []
        return [finding.text for finding in self.root_findings if finding.outcome in (outcome, Outcome.INCONCLUSIVE)]

    @property
    def unjudged(self) -> str | None:
        """What kept an inconclusive version from being judged, a cause; ``no recipe`` where nobody declared one."""
        if self.outcome is not Outcome.INCONCLUSIVE:
            return None
        known = [row.cause for row in decisive(self.rows) if row.cause]
        if known:
            return known[0]
        undeclared = any(r.check == RECIPE_DECLARED.name and r.outcome is Outcome.INCONCLUSIVE for r in self.rows)
        return Cause.NO_RECIPE if undeclared else Cause.UNRESOLVED

    @property
    def counts(self) -> dict[str, int]:
        """Number of rows by the outcome that counts: what is waived warns."""
        counted = Counter(row.counted for row in self.rows)
        return {str(outcome): counted[outcome] for outcome in Outcome}

    @property
    def failed_checks(self) -> list[str]:
        """Names of the failed checks, in the rows' order."""
        return list(dict.fromkeys(row.check for row in self.rows if _failed(row)))

    @property
    def failed_parameters(self) -> list[str]:
        """Names of the parameters a failed row names, in the rows' order."""
        names = (row.parameter for row in self.rows if _failed(row) and row.parameter)
        return list(dict.fromkeys(name for name in names if not name.startswith(BATCH_PREFIX)))

    @property
    def not_checked(self) -> list[dict[str, str]]:
        """What was skipped and why, each reason once per check."""
        return [
            {
                "check": check,
                "reason": f"{left.reason} ({listed(left.parameters)})" if left.parameters else left.reason,
            }
            for left in not_checked(self.rows)
            for check in left.checks
        ]

    @property
    def headline(self) -> str:
        """The verdict in one sentence, and what limits it."""
        return " ".join((self._verdict, *self.limits))

    @property
    def _verdict(self) -> str:
        covered = f"{self.coverage:.0%} of the trainable parameters covered"
        if self.narrowed:
            covered = "only what was asked for was looked at"
        match self.outcome:
            case Outcome.FAIL:
                failed = [finding for finding in self.root_findings if finding.outcome is Outcome.FAIL]
                return f"FAIL: {in_one_line(failed)}; {covered}."
            case Outcome.INCONCLUSIVE:
                return f"INCONCLUSIVE: {self._why_unclear}; {covered}."
            case Outcome.WARN:
                opened = {id(row) for row in open_claims(self.rows)}
                doubts = [
                    finding
                    for finding in self.root_findings
                    if finding.outcome is Outcome.WARN or any(id(row) in opened for row in finding.rows)
                ]
                doubts.sort(key=lambda finding: finding.outcome is not Outcome.WARN)
                return f"PASS WITH WARNINGS: {in_one_line(doubts)}; {covered}."
            case _:
                held = self.counts["pass"]
                return f"PASS: {held} claim{' holds' if held == 1 else 's hold'}; {covered}."

    @property
    def _why_unclear(self) -> str:
        known, silent = decisive(self.rows), self.coverage_of.silent
        if not known and silent and not self.coverage:
            return f"every gradient is zero ({listed(silent)}): the loss asks for no change of any parameter"
        unclear = [*known, *(row for row in self.rows if row.outcome is Outcome.INCONCLUSIVE)]
        left = list(self.coverage_of.unresolved)
        return unclear[0].message if unclear else f"not enough could be checked{f' ({listed(left)})' if left else ''}"

    def __repr__(self) -> str:
        """Return the verdict in one line: what a failed assertion shows of a report."""
        return f"<AuditReport {self.headline}>"

    def __str__(self) -> str:
        """Return the headline, the findings by root cause, worst first, and where the rest is."""
        found = self.root_findings
        lines = [self.headline]
        for finding in found[:SUMMARY_LINES]:
            lines.append(f"  {finding.outcome}  {finding.text} ({', '.join(finding.checks)})")
            lines.append(f"        {_cut(finding.rows[0].message)}")
        if more := and_more(len(found) - SUMMARY_LINES, "more findings"):
            lines.append(f"  {more}")
        judged = {row.check for row in self.rows if row.outcome is not Outcome.SKIPPED}
        skipped = [check for check in dict.fromkeys(left["check"] for left in self.not_checked) if check not in judged]
        if skipped:
            lines.append(f"  not checked: {', '.join(skipped)}")
        lines.append(".findings has every finding in full, .not_checked why not, .to_frame() all rows.")
        return "\n".join(lines)

    def to_table(self) -> pa.Table:
        """Return the rows as an Arrow table with the Parquet schema."""
        from audits.results.format import answer_table, rows_table

        return rows_table(answer_table(self.rows), self.identity)

    def to_frame(self) -> pd.DataFrame:
        """Return the rows as a pandas data frame with the Parquet schema's columns."""
        from audits.results.store import to_frame

        return to_frame(self.to_table())

    def to_dict(self, *, rerun: str | None = None) -> dict[str, Any]:
        """Return what ``--json`` prints.

        Args:
            rerun: a command with ``{options}`` in it, repeated in every finding with the options that repeat it.
        """
        identity = self.identity
        return {
            "schema": JSON_SCHEMA,
            "audit_id": identity.audit_id,
            "model": identity.model_name,
            "version": identity.model_version,
            "outcome": str(self.outcome),
            "headline": self.headline,
            "coverage": round(self.coverage, 6),
            "artifact_kind": identity.artifact_kind,
            "isolation": identity.isolation,
            "device": identity.device,
            "torch": identity.torch,
            "seconds": round(self.seconds, 3),
            "run_id": self.run_id,
            "counts": self.counts,
            "causes": [
                {
                    "cause": one.cause,
                    "outcome": str(one.outcome),
                    "checks": list(one.checks),
                    "parameters": list(one.parameters),
                }
                for one in self.root_findings
            ],
            "findings": [_finding(row, rerun) for row in self.findings],
            "not_checked": self.not_checked,
        }

    def _repr_html_(self) -> str:
        """Show the report in a notebook."""
        from audits.notebook import fragment

        return fragment(self)


def reason_of(headline: str) -> str:
    """Return what a verdict rests on, from its headline: causes and checks; empty for a plain pass.

    Args:
        headline: `AuditReport.headline`, of a stored audit say.
    """
    verdict_, _, rest = headline.partition(": ")
    found = _COVERED.search(rest)
    return "" if verdict_ == "PASS" else rest[: found.start()] if found else rest


def _cut(text: str, limit: int = 160) -> str:
    """Return the first line, cut where it is long."""
    line = text.splitlines()[0] if text else ""
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def _failed(row: ResultRow) -> bool:
    return row.counted is Outcome.FAIL


def _finding(row: ResultRow, rerun: str | None) -> dict[str, Any]:
    numbers = {name: finite(getattr(row, name)) for name in ("measured", "expected", "error", "threshold")}
    kept = dataclasses.asdict(row)
    return {
        **{
            name: kept[name]
            for name in ("check", "outcome", "severity", "phase", "step", "lane", "parameter", "module")
        },
        **numbers,
        "detection_limit": finite(row.detection_limit),
        "cause": row.cause,
        "waiver": row.waiver,
        "message": row.message,
        "where_to_look": row.where_to_look,
        "rerun": rerun and rerun.format(options=rerun_options(row)),
    }


def rerun_options(row: ResultRow) -> str:
    """Return the command-line options that repeat this row, quoted for a POSIX shell."""
    options = ["--check", row.check]
    if row.parameter and not row.parameter.startswith("<"):
        options += ["--parameter", row.parameter]
    if row.seed is not None:
        options += ["--seed", str(row.seed)]
    return shell_words(options)
