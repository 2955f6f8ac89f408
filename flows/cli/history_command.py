"""``gradaudit history``: a model's parameters over time, and since when one fails."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.text import Text

from audits.errors import InputError
from audits.history.parameter_history import HistoryEntry, ParameterHistory, by_parameter, history
from audits.history.reading import committed_audits, unknown_model
from audits.outcomes import Outcome, finite
from audits.results.store import ResultsStore
from audits.wording import plural
from flows.cli.display import add_names, outcome_text, shown, simple_table
from flows.cli.plain_tables import print_csv
from flows.output import console, print_json
from flows.settings.environment import GradauditSettings

#: Columns from which threshold and detection limit have room, and the threshold alone.
_WIDE, _MEDIUM = 110, 100


def show_history(
    model: str,
    settings: GradauditSettings,
    *,
    parameter: str | None,
    check: str | None,
    since: datetime.date | None,
    as_json: bool,
    as_csv: bool,
) -> int:
    """Print one line per audit and parameter, oldest first; return 0.

    Raises:
        InputError: nothing of this model is stored, or nothing matches; the text names what there is.
        InfrastructureError: the store cannot be read.
    """
    store = ResultsStore(settings.results)
    entries = history(store, model, parameter=parameter, check=check, since=since)
    if not entries:
        raise _nothing(store, model, parameter, check, since)
    if as_json:
        print_json([_plain(entry) for entry in entries], allow_nan=False)
    elif as_csv:
        print_csv([_plain(entry) for entry in entries])
    else:
        console.print(history_view(model, by_parameter(entries), every=parameter is not None))
    return 0


def history_view(model: str, histories: Sequence[ParameterHistory], *, every: bool) -> Group:
    """Return the histories for the terminal.

    Args:
        model: the model's name.
        histories: one a parameter.
        every: show parameters that passed every time too, rather than their number.
    """
    eventful = [s for s in histories if every or any(_finding(m) for m in s.entries)]
    quiet = len(histories) - len(eventful)
    parts: list[Any] = [Text(line) for one in eventful if (line := sentence(one))]
    if eventful:
        figures_shown = 3 if console.width >= _WIDE else 2 if console.width >= _MEDIUM else 1
        table = simple_table()
        for column in ("audited (UTC)", "v", "outcome"):
            table.add_column(column, no_wrap=True)
        checks = {entry.check for one in eventful for entry in one.entries if _finding(entry)}
        add_names(table, "parameter, check", checks, indent=2)
        for column in ("error", "threshold", "detectable")[:figures_shown]:
            table.add_column(column, justify="right", no_wrap=True)
        for one in eventful:
            for entry in one.entries:
                figures = (entry.error, entry.threshold, entry.detection_limit)[:figures_shown]
                where = Text(f"{_name(one)}\n  {entry.check}" if _finding(entry) else _name(one))
                cells = [Text("" if f is None else f"{f:.2g}") for f in figures]
                version = "" if entry.version is None else str(entry.version)
                at = f"{entry.audited_at:%Y-%m-%d %H:%M}"
                table.add_row(at, version, outcome_text(str(entry.outcome)), where, *cells)
            table.add_section()
        parts.append(table)
    if quiet:
        audits = len({entry.audit_id for one in histories for entry in one.entries})
        counted = f"{plural(quiet, 'parameter')}, {plural(audits, 'audit')}"
        also = "Every other" if eventful else "Every"
        what = f"{also} claim of {shown(model)} held in every audit that judged it"
        parts.append(Text(f"{what} ({counted}); --parameter GLOB shows them", style="dim"))
    return Group(*parts)


def sentence(one: ParameterHistory) -> str:
    """Say since when the parameter fails; an empty text when it does not fail now."""
    since, before = one.failing_since, one.before_failing
    if since is None:
        return ""
    began = f"{_name(one)} fails {since.check} since v{since.version}, {since.audited_at:%Y-%m-%d %H:%M} UTC"
    if before is None:
        return f"{began}: never judged right before."
    return f"{began}; last right in v{before.version}, {before.audited_at:%Y-%m-%d %H:%M} UTC."


def _name(one: ParameterHistory) -> str:
    return "whole model" if one.parameter is None else shown(one.parameter)


def _finding(entry: HistoryEntry) -> bool:
    return entry.outcome in (Outcome.FAIL, Outcome.WARN, Outcome.INCONCLUSIVE)


def _plain(entry: HistoryEntry) -> dict[str, Any]:
    plain = dataclasses.asdict(entry)
    plain["audited_at"] = entry.audited_at.isoformat()
    plain["outcome"] = str(entry.outcome)
    for name in ("error", "threshold", "detection_limit"):
        plain[name] = finite(plain[name])
    return plain


def _nothing(
    store: ResultsStore, model: str, parameter: str | None, check: str | None, since: datetime.date | None
) -> InputError:
    audits = committed_audits(store, model)
    if not audits:
        return unknown_model(store, model)
    options = {"--parameter": parameter, "--check": check, "--since": since}
    asked = " ".join(f"{name} {value}" for name, value in options.items() if value is not None)
    stored = "is stored" if len(audits) == 1 else "are stored"
    newest = f"{audits[0]['audited_at']:%Y-%m-%d}"
    return InputError(
        f"{plural(len(audits), 'audit')} of {model} {stored}, the newest of {newest}, but nothing matches {asked}: a "
        "glob has to match the whole name, such as '*.weight'"
    )
