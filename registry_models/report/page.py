"""What the report page shows, in the page's order, as plain data for its template."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from audits.findings.skipped import Unchecked, not_checked
from audits.naming import visible
from audits.outcomes import Outcome, ResultRow
from audits.report import AuditReport
from audits.wording import listed, plural
from registry_models.report.changes import Changes
from registry_models.report.findings import Finding, FindingGroup, finding_groups
from registry_models.report.lines import RANK, ParameterLine, is_parameter, parameter_lines, shown_outcome
from registry_models.report.text import duration, one_line, shortened
from registry_models.untrusted_text import clean

#: Claims about the whole model that a page lists row by row.
LISTED_CLAIMS = 400

#: Parameters that a page lists, those with findings first, and names of unresolved ones. 10,000 tensors are four MB.
LISTED_PARAMETERS, LISTED_NAMES = 5000, 500

#: A network with more tensors starts with its healthy parts folded.
FOLDED_ABOVE = 40

_WORDS = {
    Outcome.PASS: "Pass",
    Outcome.WARN: "Pass with warnings",
    Outcome.FAIL: "Fail",
    Outcome.INCONCLUSIVE: "Inconclusive",
    Outcome.SKIPPED: "Skipped",
}


@dataclass(frozen=True)
class Group:
    """A part of the network: the lines that fold together."""

    name: str
    lines: tuple[ParameterLine, ...]
    counts: tuple[tuple[Outcome, int], ...]
    folded: bool


@dataclass(frozen=True)
class Page:
    """Everything the template needs; see the template for the order."""

    subject: str
    outcome: Outcome
    word: str
    verdict: str
    first: Finding | None
    report: AuditReport
    counts: tuple[tuple[Outcome, int], ...]
    groups: list[FindingGroup]
    unlisted: int
    lines: list[ParameterLine]
    parts: list[Group]
    claims: list[ResultRow]
    unlisted_claims: int
    not_checked: list[Unchecked]
    unlisted_lines: int
    unresolved: tuple[str, ...]
    unlisted_names: int
    anchors: Mapping[str, str]
    changes: Changes | None
    provenance: list[tuple[str, str]]
    fields: Mapping[str, str]
    recipe_yaml: str | None
    rerun: str
    links: Mapping[str, str]
    audited_at: str


def page_of(
    report: AuditReport,
    *,
    rerun: str,
    recipe_yaml: str | None,
    links: Mapping[str, str] | None,
    changes: Changes | None,
) -> Page:
    """Return the page of an audit."""
    groups, unlisted = finding_groups(report, rerun)
    lines = parameter_lines(report.rows, report.coverage_of.unresolved)
    listed = _worst_first(lines)
    claims = [row for row in report.rows if not is_parameter(row)]
    claims.sort(key=lambda row: RANK[shown_outcome(row)])
    anchors: dict[str, str] = {}
    for group in groups:
        for finding in group.findings:
            anchors.setdefault(finding.row.parameter or "", finding.anchor)
    first = groups[0].findings[0] if groups else None
    return Page(
        subject=_subject(report),
        outcome=report.outcome,
        word=_WORDS[report.outcome],
        verdict=verdict_sentence(report, groups),
        first=first,
        report=report,
        counts=_counts([shown_outcome(row) for row in report.rows]),
        groups=groups,
        unlisted=unlisted,
        lines=listed,
        parts=_parts(listed),
        claims=claims[:LISTED_CLAIMS],
        unlisted_claims=max(0, len(claims) - LISTED_CLAIMS),
        not_checked=not_checked(report.rows),
        unlisted_lines=len(lines) - len(listed),
        unresolved=report.coverage_of.unresolved[:LISTED_NAMES],
        unlisted_names=max(0, len(report.coverage_of.unresolved) - LISTED_NAMES),
        anchors=anchors,
        changes=changes,
        provenance=_provenance(report),
        fields=report.provenance,
        recipe_yaml=None if recipe_yaml is None else clean(recipe_yaml),
        rerun=rerun.format(options="").strip(),
        links=links or {},
        audited_at=_utc(report.identity.audited_at),
    )


def _worst_first(lines: list[ParameterLine]) -> list[ParameterLine]:
    """The lines that a page has room for, in their order; of too many, those with the worst outcome."""
    if len(lines) <= LISTED_PARAMETERS:
        return lines
    return sorted(sorted(lines, key=lambda line: RANK[line.worst])[:LISTED_PARAMETERS], key=lambda line: line.index)


def verdict_sentence(report: AuditReport, groups: Sequence[FindingGroup]) -> str:
    """Return the verdict in one sentence: what is wrong and where."""
    subject = _subject(report)
    match report.outcome:
        case Outcome.FAIL:
            failed = [group for group in groups if group.outcome is Outcome.FAIL]
            where = f" ({shortened(one_line(failed[0].where), 80)})" if failed[0].where else ""
            more = f"; and {plural(len(failed) - 1, 'more cause')}" if len(failed) > 1 else ""
            return f"{subject} does not train correctly: {shortened(one_line(failed[0].cause), 160)}{where}{more}."
        case Outcome.INCONCLUSIVE:
            if report.coverage_of.tensors == 0:
                return f"{subject} could not be judged."
            return f"{subject} could not be judged: {report.coverage:.0%} of its trainable parameters are resolved."
        case Outcome.WARN:
            warned = len(groups)
            return f"{subject} trains correctly as far as it was judged, with {plural(warned, 'open point')}."
        case _:
            return f"{subject} trains correctly: all {plural(report.counts['pass'], 'judged claim')} hold."


def _subject(report: AuditReport) -> str:
    identity = report.identity
    name = visible(identity.model_name) or "The model"
    return f"{name} v{identity.model_version}" if identity.model_version is not None else name


def _counts(outcomes: Sequence[Outcome]) -> tuple[tuple[Outcome, int], ...]:
    """Return how often each outcome occurs, worst first, those that do not occur left out."""
    return tuple((outcome, outcomes.count(outcome)) for outcome in RANK if outcome in outcomes)


def _parts(lines: Sequence[ParameterLine]) -> list[Group]:
    grouped: dict[str, list[ParameterLine]] = {}
    for line in lines:
        grouped.setdefault(line.group, []).append(line)
    parts = []
    for name, members in grouped.items():
        counts = _counts([line.worst for line in members])
        healthy = not any(outcome in (Outcome.FAIL, Outcome.WARN) for outcome, _ in counts)
        parts.append(Group(name, tuple(members), counts, folded=healthy and len(lines) > FOLDED_ABOVE))
    return parts


def _provenance(report: AuditReport) -> list[tuple[str, str]]:
    identity = report.identity
    seeds = sorted({row.seed for row in report.rows if row.seed is not None})
    version = "" if identity.model_version is None else str(identity.model_version)
    named = [
        ("Model", visible(identity.model_name)),
        ("Version", version),
        ("Audited at", _utc(identity.audited_at)),
        ("Duration", duration(report.seconds)),
        ("torch", identity.torch),
        ("Device", identity.device),
        ("CUDA", identity.driver),
        ("Artifact kind", identity.artifact_kind),
        ("Isolation", identity.isolation),
        ("Seeds", listed(map(str, seeds), 8)),
        ("Model digest", identity.model_digest),
        ("Recipe digest", identity.recipe_digest),
        ("Settings digest", identity.settings_digest),
        ("Audit", identity.audit_id),
        ("MLflow run", report.run_id or ""),
    ]
    return [(name, one_line(value)) for name, value in named if value]


def _utc(moment: datetime.datetime) -> str:
    return moment.astimezone(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
