"""What people see in a terminal: tables on stdout, progress on stderr."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.cells import cell_len
from rich.console import Group
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from audits.findings.root_causes import RootFinding
from audits.findings.skipped import not_checked
from audits.naming import label_of, visible
from audits.outcomes import WORST_FIRST, Outcome
from audits.report import AuditReport
from audits.signs import SIGNS
from audits.wording import and_more, as_sentence, plural
from flows.choosing.progress import Listener
from flows.output import console, log_console
from registry_models.report.text import one_line, shortened
from registry_models.untrusted_text import clean

if TYPE_CHECKING:
    from flows.choosing.audit_summary import AuditSummary

_STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red", "inconclusive": "magenta", "skipped": "dim"}

#: Characters of the reason that stands beside a verdict: three lines or so.
WHY = 240

#: Columns that a name has in any terminal, and passes up to which each has its own line.
SHORTEST_NAME, FOLDED = 20, 3

#: Where a sentence ends and another begins.
_SENTENCE = re.compile(r"(?<=[\w)\]'\"])\. (?=[A-Z])")

#: Where a message goes on with what to do about it.
_CURE = re.compile(r"[:;,] (?=(?:log|register|give|attach|install|set|declare|narrow)\b)")

#: Columns from which check and parameter stand side by side.
WIDE = 104

#: Characters of a headline that a terminal shows: ten lines; names of parameters can be as long.
HEADLINE = 800

#: Parameters a terminal names beside one finding that they share.
SHOWN_NAMES = 3

#: Findings a terminal shows before it points to the report.
SHOWN_FINDINGS = 12


def outcome_text(outcome: str) -> Text:
    """Return the outcome with its mark; colour is never the only sign."""
    return Text(f"{SIGNS[Outcome(outcome)]} {outcome}", style=_STYLES[outcome])


def verdicts_table(summaries: Iterable[AuditSummary], title: str, *, every: bool = False) -> Table:
    """Return one line per version: model, outcome and why, the cause first, with the checks that saw it.

    Names are cut where there is no room, outcomes never.

    Args:
        summaries: the versions.
        title: above them.
        every: also those that pass, in the order given; otherwise what needs a look comes first, and many passes are
            one line.
    """
    rows = list(summaries)
    width = max(SHORTEST_NAME, console.width // 3)
    table = simple_table(title)
    table.add_column("model", no_wrap=True, overflow="ellipsis", max_width=width)
    for column in ("v", "outcome"):
        table.add_column(column, no_wrap=True)
    table.add_column("why", overflow="fold", ratio=1)
    passed = [] if every else [s for s in rows if s["outcome"] == Outcome.PASS]
    folded = passed if len(passed) > FOLDED else []
    if not every:
        order = [str(outcome) for outcome in WORST_FIRST]
        rows = sorted((s for s in rows if s not in folded), key=lambda s: order.index(s["outcome"]))
    limit = WHY if console.width >= WIDE else WHY // 2
    for s in rows:
        name, why = cut_name(visible(s["model"]), width), shortened_reason(shown(s["why"]), limit)
        table.add_row(Text(name), str(s["version"]), outcome_text(s["outcome"]), Text(why))
    if folded:
        table.add_row("", "", Text(f"{SIGNS[Outcome.PASS]} {len(folded)} pass", style=_STYLES["pass"]), "")
    return table


def cut_name(name: str, width: int) -> str:
    """Return a name in so many columns of a terminal, a wide character taking two: its middle makes room."""
    if cell_len(name) <= width:
        return name
    head, tail = "", ""
    for character in name:
        if cell_len(head + character) > (width - 1) // 2:
            break
        head += character
    for character in reversed(name):
        if cell_len(character + tail) > width - 1 - cell_len(head):
            break
        tail = character + tail
    return f"{head}…{tail}"


def shortened_reason(why: str, limit: int) -> str:
    """Return a reason's cause: its first sentence without the cure, in so many characters."""
    first = _CURE.split(_SENTENCE.split(why, maxsplit=1)[0], maxsplit=1)[0]
    return first if len(first) <= limit else f"{first[:limit].rsplit(' ', 1)[0].rstrip(' ,;:')} …"


def shown(name: str) -> str:
    """Return a name that comes from a model on one line, without what could act on a terminal."""
    return one_line(name)


def simple_table(title: str | None = None) -> Table:
    """Return an empty table in the house's style."""
    return Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1)
    )


def report_view(report: AuditReport) -> Group:
    """Return one audit for the terminal: verdict, findings, what was not checked."""
    parts: list[Table | Text] = [Text(shortened(shown(report.headline), HEADLINE), style=_STYLES[str(report.outcome)])]
    findings = report.root_findings
    if findings:
        parts.append(_findings_table(findings[:SHOWN_FINDINGS]))
        if len(findings) > SHOWN_FINDINGS:
            hidden = len(findings) - SHOWN_FINDINGS
            parts.append(Text(f"... and {plural(hidden, 'more finding')}: --json or --html FILE shows all"))
    counts = ", ".join(f"{number} {name}" for name, number in report.counts.items() if number)
    parts.append(Text(f"{counts}; {report.seconds:.1f} s on {report.identity.device or 'no device'}", style="dim"))
    for left in not_checked(report.rows)[:SHOWN_FINDINGS]:
        which = f" ({plural(len(left.parameters), 'parameter')})" if left.parameters else ""
        parts.append(Text(f"not checked: {', '.join(left.checks)}: {shown(left.reason)}{which}", style="dim"))
    return Group(*parts)


def _findings_table(findings: Sequence[RootFinding]) -> Table:
    """One line a root cause: what is wrong, which checks saw it, the parameters, and what was seen of the first."""
    wide = console.width >= WIDE
    table = simple_table()
    table.add_column("outcome", no_wrap=True)
    checks = (check for finding in findings for check in finding.checks)
    add_names(table, "check, parameter" + ("" if wide else ", what was seen"), checks)
    if wide:
        table.add_column("what was seen", overflow="fold")
    for finding in findings:
        row = finding.rows[0]
        names = [shown(name) for name in (finding.parameters or [row.parameter or ""]) if name]
        more = and_more(len(names) - SHOWN_NAMES)
        where = "\n".join([*finding.checks, *(f"  {name}" for name in [*names[:SHOWN_NAMES], more] if name)])
        cause = finding.cause if clean(finding.cause) not in clean(row.message) else ""
        seen = [f"{cause}." if cause else "", row.message]
        seen += [row.where_to_look] if row.where_to_look and row.counted is Outcome.FAIL else []
        seen += [f"Waived: {one_line(row.waiver)}"] if row.waiver else []
        text = clean("\n".join(as_sentence(part, row.parameter) for part in seen if part))
        cells = [Text(clean(where)), Text(text)] if wide else [Text(f"{clean(where)}\n{text}")]
        table.add_row(outcome_text(str(finding.outcome)), *cells)
        if not wide:
            table.add_section()
    return table


def add_names(table: Table, title: str, names: Iterable[str], *, indent: int = 0) -> None:
    """Add a column wide enough for every one of these names, for a name in pieces can be neither read nor copied."""
    table.add_column(title, overflow="fold", min_width=max((len(name) + indent for name in names), default=0) or None)


@contextlib.contextmanager
def stages(first: str) -> Iterator[Callable[[str], None]]:
    """Show on stderr what is being done: a line that changes in a terminal, a line a stage elsewhere.

    Yields:
        What is called with the next stage.
    """
    if log_console.is_terminal:
        with log_console.status(escape(first)) as status:
            yield lambda stage: status.update(escape(stage))
    else:
        log_line(first)
        yield log_line


def log_line(text: str) -> None:
    """Print one line on stderr, whole, as it is."""
    log_console.print(text, markup=False, highlight=False, soft_wrap=True)


class ProgressBar(Listener):
    """A bar on stderr when it is a terminal; one line per finished version otherwise."""

    def __init__(self, description: str = "auditing") -> None:
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=log_console,
            transient=True,
            disable=not log_console.is_terminal,
        )
        self._task = self._bar.add_task(description, total=None)

        self.result: dict[str, Any] | None = None
        self.total, self.done = 0, 0

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def planned(self, total: int) -> None:
        """Set the bar's length."""
        self.total = total
        self._bar.update(self._task, total=total)

    def stage(self, label: str, stage: str) -> None:
        """Show what is being done."""
        self._bar.update(self._task, description=f"{stage} {escape(label)}")

    def finished(self, summary: AuditSummary) -> None:
        """Advance, and leave a line behind; in a terminal the bar counts what passes."""
        self.done += 1
        if summary["outcome"] == Outcome.PASS and log_console.is_terminal:
            self._bar.advance(self._task)
            return
        self.step(
            Text.assemble(outcome_text(summary["outcome"]), f"  {label_of(summary['model'], summary['version'])}")
        )

    def set_aside(self, label: str, why: str) -> None:
        """Advance, and say that this one is outside the audit."""
        self.done += 1
        self.step(f"{SIGNS[Outcome.SKIPPED]} outside the audit  {label}: {why}")

    def ended(self, result: dict[str, Any]) -> None:
        """Keep the result."""
        self.result = result

    def step(self, line: Text | str) -> None:
        """Leave a line behind and advance by one."""
        log_console.print(line, highlight=False, markup=False)
        self._bar.advance(self._task)
