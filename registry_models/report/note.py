"""The note on an audit's MLflow run: markdown, its first line plain text."""

from __future__ import annotations

from collections.abc import Mapping

from audits.findings.root_causes import RootFinding
from audits.findings.skipped import not_checked
from audits.report import AuditReport
from audits.signs import SIGNS
from audits.wording import and_more, as_sentence, plural
from registry_models.report.changes import Changes
from registry_models.report.text import escape_markdown, one_line, shortened

#: Findings and reasons a note names; the report holds them all. MLflow cuts tags at 5,000 characters.
NAMED, NAMED_REASONS, LONGEST = 8, 6, 260


def render_markdown(report: AuditReport, *, links: Mapping[str, str], changes: Changes | None = None) -> str:
    """Return the note.

    Args:
        report: the audit.
        changes: what changed since the last audited version.
        links: text -> address (relative or absolute), shown last in this order.
    """
    found = report.root_findings
    paragraphs = [escape_markdown(shortened(one_line(report.headline), 400))]
    if found:
        bullets = [_bullet(finding) for finding in found[:NAMED]]
        if len(found) > NAMED:
            bullets.append(f"- and {plural(len(found) - NAMED, 'more finding')}, all in report.html")
        paragraphs.append("**Findings**\n\n" + "\n".join(bullets))
    if changes is not None:
        paragraphs.append(_since(changes))
    skipped = not_checked(report.rows)
    if skipped:
        reasons = [f"- {_short(', '.join(item.checks))}: {_short(item.reason)}" for item in skipped[:NAMED_REASONS]]
        if more := and_more(len(skipped) - NAMED_REASONS):
            reasons.append(f"- {more}")
        paragraphs.append("**Not checked**\n\n" + "\n".join(reasons))
    if links:
        paragraphs.append(" · ".join(f"[{escape_markdown(text)}]({_address(to)})" for text, to in links.items()))
    return "\n\n".join(paragraphs)


def _bullet(finding: RootFinding) -> str:
    row = finding.rows[0]
    checks = escape_markdown(", ".join(finding.checks))
    waived = f" *Waived:* {_short(row.waiver)}" if row.waiver else ""
    seen = f" {_short(as_sentence(row.message, row.parameter))}" if row.message else ""
    return f"- {SIGNS[finding.outcome]} **{finding.outcome}** {_short(finding.text)} ({checks}).{seen}{waived}"


def _since(changes: Changes) -> str:
    """The changes in a few lines: findings that read the same but for the parameter are one."""
    head = f"**Since {_short(changes.against)}** (differs: {_short(changes.cause)})"
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for change in changes.listed:
        if change.kind != "same":
            grouped.setdefault((change.kind, change.check, change.cause), []).append(change.parameter or "")
    lines = []
    for (kind, check, cause), names in list(grouped.items())[:NAMED_REASONS]:
        named = f" {_short(names[0])}" if names[0] else ""
        what = " ".join(filter(None, (escape_markdown(check) + named, and_more(len(names) - 1))))
        lines.append(f"- **{kind}** {what}: {_short(cause)}")
    if more := and_more(len(grouped) - NAMED_REASONS):
        lines.append(f"- {more}")
    return f"{head}\n\n" + ("\n".join(lines) if lines else "No finding is new, and none has gone.")


def _short(text: str) -> str:
    return escape_markdown(shortened(one_line(text), LONGEST))


def _address(address: str) -> str:
    """Return the address with the characters encoded that would end a markdown link."""
    return "".join(f"%{ord(c):02X}" if c in " ()<>\\\"'" else c for c in one_line(address))
