"""``gradaudit settings``: what is in force and where each setting comes from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from rich.text import Text

from audits.errors import SettingsError
from audits.globs import matches
from flows.cli.display import shown, simple_table
from flows.output import console, print_json
from flows.sandbox import reached_level
from flows.sandbox.levels import NOT_GIVEN
from flows.settings.environment import GradauditSettings
from flows.settings.settings_values import Origin
from flows.team_policy import today, waivers_of

#: The password in an address such as ``postgresql://user:password@host``.
_PASSWORD = re.compile(r"(?<=://)([^/@\s:]*):[^/@\s]+@")


def show_settings(settings: GradauditSettings, model: str | None, *, as_json: bool) -> int:
    """Print the settings in force; of one model's audits with ``model``.

    Raises:
        SettingsError: one of them cannot be, or the waivers file is broken.
    """
    waivers = [w for w in waivers_of(settings) if model is None or matches(model, w.model)]
    audit = settings.audit_origins(model or "")
    isolation, told = _isolation(settings)
    general = [o for o in settings.origins() if o.name not in ("audit", "severity", *(["models"] if model else []))]
    if as_json:
        plain: dict[str, Any] = {"settings": _plain(general), "audit": _plain(audit), "model": model}
        plain["isolation"] = {"reached": isolation, "means": told}
        plain["waivers"] = [
            {"about": w.label, "reason": w.reason, "owner": w.owner, "expires": str(w.expires),
             "holds": w.holds(today())} for w in waivers
        ]  # fmt: skip
        print_json(plain, default=str)
        return 0
    table = simple_table()
    for column in ("setting", "value", "from"):
        table.add_column(column, overflow="fold")
    _add(table, general)
    console.print(table)
    audits = simple_table(f"Audits of {shown(model)}" if model else "Audits")
    for column in ("setting", "value", "from"):
        audits.add_column(column, overflow="fold")
    _add(audits, audit)
    console.print(audits)
    console.print(Text(f"Isolation on this host: {isolation or 'none'}: {told}."))
    for waiver in waivers:
        state = "" if waiver.holds(today()) else "expired: "
        line = f"{state}waiver of {waiver.label}: {waiver.text}"
        console.print(Text(shown(line), style="" if not state else "yellow"))
    return 0


def _isolation(settings: GradauditSettings) -> tuple[str | None, str]:
    """The level that audits reach here, and what a model's code can do there; or why none is reached."""
    try:
        level = reached_level(settings.isolation)
    except SettingsError as error:
        return None, str(error)
    return str(level), NOT_GIVEN[level]


def _add(table: Any, origins: Iterable[Origin]) -> None:
    for origin in origins:
        style = "dim" if origin.where == "default" else ""
        cells = (origin.name, _text(origin.value), origin.where)
        table.add_row(*(Text(shown(cell), style=style) for cell in cells))


def _plain(origins: Iterable[Origin]) -> dict[str, dict[str, Any]]:
    return {o.name: {"value": _masked(o.value), "from": o.where} for o in origins}


def _text(value: Any) -> str:
    value = _masked(value)
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _masked(value: Any) -> Any:
    return _PASSWORD.sub(r"\1:***@", value) if isinstance(value, str) else value
