"""``gradaudit diff``: one audited version held against another, a line per check and kind of change."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.text import Text

from audits.history.comparison import Change, Comparison, Difference, compare, fields_of
from audits.naming import label_of
from audits.outcomes import Outcome
from audits.report import AuditReport
from audits.results.store import ResultsStore
from flows.cli.display import WIDE, add_names, outcome_text, shown, simple_table
from flows.cli.stored_targets import stored_audit
from flows.output import console, print_json
from flows.settings.environment import GradauditSettings

_STYLES = {
    Change.NEW: "bold red",
    Change.UNJUDGED: "magenta",
    Change.SAME: "yellow",
    Change.FIXED: "green",
    Change.GONE: "dim",
}


def show_diff(before: str, now: str, settings: GradauditSettings, *, as_json: bool) -> int:
    """Print what changed from one version's newest audit to the other's.

    Returns:
        1 when something fails newly, 2 when the later audit could not judge, else 0.

    Raises:
        InputError: a version has no stored audit; the text names what there is.
        InfrastructureError: the store, or the registry for an alias, cannot be read.
    """
    store = ResultsStore(settings.results)
    comparison = compare(*(stored_audit(target, store, settings) for target in (before, now)))
    if as_json:
        print_json(_plain(comparison))
    else:
        console.print(diff_view(comparison))
    if comparison.newly_failed:
        return 1
    return 2 if comparison.now.outcome is Outcome.INCONCLUSIVE else 0


def diff_view(comparison: Comparison) -> Group:
    """Return the comparison for the terminal."""
    head = Text.assemble(_label(comparison.before), "  →  ", _label(comparison.now))
    parts: list[Any] = [head, Text(f"differs: {comparison.cause}", style="dim")]
    if not comparison.differences:
        return Group(*parts, Text("No finding is new, fixed or the same: both audits say the same of every claim."))
    table = simple_table()
    wide = console.width >= WIDE
    table.add_column("change", no_wrap=True)
    add_names(table, "check, parameter" + ("" if wide else ", cause"), (d.check for d in comparison.differences))
    table.add_column("before → now", no_wrap=True)
    if wide:
        table.add_column("cause", overflow="fold")
    for group in _grouped(comparison.differences):
        first = group[0]
        names = [d.parameter for d in group if d.parameter is not None]
        more = f" +{len(names) - 1}" if len(names) > 1 else ""
        where = f"\n  {shown(names[0])}{more}" if names else ""
        turned = Text.assemble(_outcome(first.before), " → ", _outcome(first.now))
        change = Text(str(first.change), _STYLES[first.change])
        below = "" if wide else f"\n  {first.cause}"
        table.add_row(change, Text(first.check + where + below), turned, *([first.cause] if wide else []))
    counts = [f"{len(found)} {change}" for change in Change if (found := comparison.of(change))]
    return Group(*parts, table, Text(", ".join(counts), style="dim"))


def _grouped(differences: tuple[Difference, ...]) -> list[list[Difference]]:
    """Differences that read the same but for the parameter, together."""
    groups: dict[tuple[Any, ...], list[Difference]] = {}
    for d in differences:
        groups.setdefault((d.change, d.check, d.before, d.now, d.cause), []).append(d)
    return list(groups.values())


def _outcome(outcome: Outcome | None) -> Text:
    return Text("–", style="dim") if outcome is None else outcome_text(str(outcome))


def _label(report: AuditReport) -> Text:
    identity = report.identity
    name = f"{label_of(identity.model_name, identity.model_version)} "
    at = f" {identity.audited_at:%Y-%m-%d %H:%M}"
    return Text.assemble((name, "bold"), outcome_text(str(report.outcome)), (at, "dim"))


def _plain(comparison: Comparison) -> dict[str, Any]:
    def audit(report: AuditReport) -> dict[str, Any]:
        identity = report.identity
        return {
            "audit_id": identity.audit_id,
            "model": identity.model_name,
            "version": identity.model_version,
            "audited_at": identity.audited_at.isoformat(),
            "outcome": str(report.outcome),
        }

    return {
        "schema": 1,
        "before": audit(comparison.before),
        "now": audit(comparison.now),
        "causes": {cause: list(what) for cause, what in comparison.causes.items()},
        "differences": [fields_of(difference) for difference in comparison.differences],
    }
