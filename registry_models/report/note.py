"""The note on an audit's MLflow run: markdown, its first line plain text."""

from __future__ import annotations

from collections.abc import Mapping

from audits.outcomes import Outcome, ResultRow
from audits.report import AuditReport
from audits.skipped import not_checked
from registry_models.report.lines import shown_outcome
from registry_models.report.text import escape_markdown, one_line, plural, shortened

#: Findings and reasons a note names; the report holds them all. MLflow cuts tags at 5,000 characters.
NAMED, NAMED_REASONS, LONGEST = 8, 6, 260

SYMBOLS = {
    Outcome.PASS: "✓",
    Outcome.WARN: "!",
    Outcome.FAIL: "✕",
    Outcome.INCONCLUSIVE: "?",
    Outcome.SKIPPED: "–",
}


def render_markdown(report: AuditReport, *, links: Mapping[str, str]) -> str:
    """Return the note.

    Args:
        report: the audit.
        links: text -> address (relative or absolute), shown last in this order.
    """
    found = [row for row in report.findings if row.outcome is not Outcome.SKIPPED]
    paragraphs = [escape_markdown(shortened(one_line(report.headline), 400))]
    if found:
        bullets = [_bullet(row) for row in found[:NAMED]]
        if len(found) > NAMED:
            bullets.append(f"- and {plural(len(found) - NAMED, 'more finding')}, all in report.html")
        paragraphs.append("**Findings**\n\n" + "\n".join(bullets))
    skipped = not_checked(report.rows)
    if skipped:
        reasons = [f"- {_short(', '.join(item.checks))}: {_short(item.reason)}" for item in skipped[:NAMED_REASONS]]
        if len(skipped) > NAMED_REASONS:
            reasons.append(f"- and {len(skipped) - NAMED_REASONS:,} more")
        paragraphs.append("**Not checked**\n\n" + "\n".join(reasons))
    if links:
        paragraphs.append(" · ".join(f"[{escape_markdown(text)}]({_address(to)})" for text, to in links.items()))
    return "\n\n".join(paragraphs)


def _bullet(row: ResultRow) -> str:
    outcome = shown_outcome(row)
    subject = f" {_short(row.parameter)}" if row.parameter else ""
    module = f" in {_short(row.module)}" if row.module else ""
    return f"- {SYMBOLS[outcome]} **{outcome}** {escape_markdown(row.check)}{subject}{module}: {_short(row.message)}"


def _short(text: str) -> str:
    return escape_markdown(shortened(one_line(text), LONGEST))


def _address(address: str) -> str:
    """Return the address with the characters encoded that would end a markdown link."""
    return "".join(f"%{ord(c):02X}" if c in " ()<>\\\"'" else c for c in one_line(address))
