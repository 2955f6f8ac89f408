"""A report as a notebook shows it: a fragment without script, at home on light and on dark pages."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from audits.findings.root_causes import RootFinding
from audits.findings.skipped import not_checked
from audits.outcomes import Outcome
from audits.signs import SIGNS
from audits.wording import and_more, as_sentence, listed, plural

if TYPE_CHECKING:
    from audits.report import AuditReport

#: Parameters a cell names beside one finding.
NAMED = 3

#: Findings a cell shows; ``report.findings`` has them all.
SHOWN = 20

#: Colour of each outcome; they have a contrast of 4.5 and more on white and on near-black alike, or
#: come with their sign and word in the page's own colour.
_COLOURS = {
    Outcome.PASS: "#1a8754",
    Outcome.WARN: "#b26a00",
    Outcome.FAIL: "#d64545",
    Outcome.INCONCLUSIVE: "#8257d6",
    Outcome.SKIPPED: "#7a7a7a",
}
_RULE = "border-bottom:1px solid rgba(128,128,128,.35)"
_CELL = f"padding:6px 14px 6px 0;text-align:left;vertical-align:top;background:none;{_RULE}"


def fragment(report: AuditReport) -> str:
    """Return the report as HTML: verdict, coverage, findings with what was seen, what was not checked and why.

    Names come from a model: everything is escaped.
    """
    counts = ", ".join(f"{number:,} {name}" for name, number in report.counts.items() if number)
    device = f" on {report.identity.device}" if report.identity.device else ""
    parts = [
        f'<p style="font-size:1.15em;margin:4px 0 2px">{_coloured(report.outcome, "")} {_text(report.headline)}</p>',
        f'<p style="margin:0 0 10px;opacity:.75">{_text(f"{counts}; {report.seconds:.1f} s{device}")}</p>',
        _findings(report),
        _unresolved(report),
        _left_out(report),
    ]
    return f'<div style="font-family:system-ui,sans-serif;line-height:1.45;max-width:70em">{"".join(parts)}</div>'


def _findings(report: AuditReport) -> str:
    found = report.root_findings
    if not found:
        return '<p style="margin:0 0 8px">No findings: every judged claim holds.</p>'
    head = "".join(
        f'<th scope="col" style="{_CELL};font-weight:600">{name}</th>'
        for name in ("Outcome", "Check, parameter", "What was seen")
    )
    lines = "".join(_line(finding) for finding in found[:SHOWN])
    more = and_more(len(found) - SHOWN)
    rest = f'<p style="opacity:.75">{more}: report.findings has them all</p>' if more else ""
    return (
        f'<table style="border-collapse:collapse;margin:0 0 8px"><thead><tr style="background:none">{head}</tr></thead>'
        f"<tbody>{lines}</tbody></table>{rest}"
    )


def _line(finding: RootFinding) -> str:
    row = finding.rows[0]
    checks = "<br>".join(f"<code>{_text(check)}</code>" for check in finding.checks)
    names = finding.parameters
    named = listed([f"<code>{_text(name)}</code>" for name in names], NAMED)
    where = f"<br>{named}" if named else ""
    module = (
        f'<br><span style="opacity:.7">in {_text(row.module)}</span>' if row.module and len(finding.rows) == 1 else ""
    )
    sign = _coloured(finding.outcome, finding.outcome)
    cause = f"<strong>{_text(as_sentence(finding.cause))}.</strong> "
    waived = f"<br><strong>Waived:</strong> {_text(row.waiver)}" if row.waiver else ""
    look = (
        f'<br><span style="opacity:.75">{_text(row.where_to_look)}</span>'
        if row.where_to_look and row.counted is Outcome.FAIL
        else ""
    )
    return (
        f'<tr style="background:none"><td style="{_CELL};white-space:nowrap">{sign}</td>'
        f'<th scope="row" style="{_CELL};font-weight:400">{checks}{where}{module}</th>'
        f'<td style="{_CELL}">{cause}{_text(row.message)}{waived}{look}</td></tr>'
    )


def _unresolved(report: AuditReport) -> str:
    names = report.coverage_of.unresolved
    if not names:
        return ""
    named = listed([f"<code>{_text(name)}</code>" for name in names], SHOWN)
    return f'<p style="margin:0 0 8px"><strong>Not covered</strong> ({len(names):,}): {named}</p>'


def _left_out(report: AuditReport) -> str:
    left = not_checked(report.rows)
    if not left:
        return ""
    items = "".join(
        f'<li style="margin:2px 0">{", ".join(f"<code>{_text(c)}</code>" for c in item.checks)}: {_text(item.reason)}'
        f"{_parameters(len(item.parameters))}</li>"
        for item in left
    )
    summary = f'<summary style="cursor:pointer">Not checked, and why ({len(left)})</summary>'
    return f'<details>{summary}<ul style="margin:6px 0 0;padding-left:20px">{items}</ul></details>'


def _coloured(outcome: Outcome, word: str) -> str:
    return f'<strong style="color:{_COLOURS[outcome]}">{f"{SIGNS[outcome]} {word}".rstrip()}</strong>'


def _parameters(count: int) -> str:
    return f" ({plural(count, 'parameter')})" if count else ""


def _text(value: str | None) -> str:
    return html.escape(value or "")
