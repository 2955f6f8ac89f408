"""``gradaudit checks`` and ``gradaudit explain``: what every check claims, with its thresholds as they are in force."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from audits.checks import CHECKS, find_check
from audits.checks.check import Check
from audits.settings import AuditSettings
from flows.cli.display import WIDE, simple_table
from flows.output import console, print_json
from flows.settings.environment import GradauditSettings


def run_checks(settings: GradauditSettings, *, as_json: bool) -> int:
    """Show every check; return the exit code."""
    in_force = settings.audit_settings
    if as_json:
        print_json([check.to_dict(in_force) for check in CHECKS.values()])
    else:
        console.print(checks_table(CHECKS.values(), in_force))
    return 0


def run_explain(name: str, settings: GradauditSettings, *, as_json: bool) -> int:
    """Show one check; return the exit code.

    Raises:
        InputError: there is none of that name.
    """
    check = find_check(name)
    if as_json:
        print_json(check.to_dict(settings.audit_settings))
    else:
        console.print(explanation(check, settings.audit_settings))
    return 0


def checks_table(checks: Iterable[Check], settings: AuditSettings) -> Table:
    """Return one line per check, thresholds as in force; a narrow terminal leaves them to ``gradaudit explain``."""
    wide = console.width >= WIDE
    table = simple_table("Checks")
    table.add_column("check", no_wrap=True)
    for column in ("claim", "severity", *(["threshold"] if wide else [])):
        table.add_column(column, overflow="fold")
    for check in checks:
        cells = [check.name, escape(check.claim), str(check.severity), escape(check.threshold(settings))]
        table.add_row(*cells[: None if wide else 3])
    return table


def explanation(check: Check, settings: AuditSettings) -> Group:
    """Return everything that is known of one check, its thresholds as these settings have them."""
    table = Table.grid(padding=(0, 2))
    for name, text in check.explanation(settings):
        table.add_row(Text(name, style="bold"), escape(text))
    return Group(Text(check.name, style="bold"), table)
