"""``gradaudit sql``: a question to the results store."""

from __future__ import annotations

import datetime
import math
import sys
from typing import Any

import pyarrow as pa
from rich.table import Table
from rich.text import Text

from audits.results.queries import query
from audits.results.store import ResultsStore
from flows.arguments import refuse_absent
from flows.cli.display import shown, simple_table
from flows.cli.plain_tables import print_csv
from flows.output import console, print_json
from flows.settings.environment import GradauditSettings

#: Lines a terminal shows; a pipe, CSV and JSON get all.
SHOWN = 200

#: Characters a column of sentences needs at least; with less room a row is shown as a block of its own.
READABLE = 40

#: Characters between two columns.
PADDING = 3


def show_query(
    sql: str, settings: GradauditSettings, *, since: datetime.date | None = None, as_json: bool, as_csv: bool
) -> int:
    """Print the answer as a table, as CSV or as JSON; return 0. Views have the audits from the day ``since`` on.

    Raises:
        InputError: DuckDB cannot run it, it is no single SELECT, or there is no such store.
        InfrastructureError: the store cannot be read.
    """
    store = ResultsStore(settings.results)
    table = query(store, sys.stdin.read() if sql == "-" else sql, since=since)
    refuse_absent(store)  # after what is wrong with the query itself
    names = _unique(table.column_names)
    if as_json:
        lines = _lines(table)
        print_json([dict(zip(names, line, strict=True)) for line in lines], default=str)
    elif as_csv:
        print_csv([dict(zip(names, line, strict=True)) for line in _lines(table)], names)
    else:
        _print(table, names)
    return 0


def _print(table: pa.Table, names: list[str]) -> None:
    limit = SHOWN if console.is_terminal else table.num_rows
    lines = _lines(table.slice(0, limit))
    if not lines:
        console.print(Text(f"no rows; columns: {', '.join(shown(name) for name in names)}", style="dim"))
        return
    _print_table(table, names, lines) if _fits(names, lines) else _print_records(names, lines)
    count = f"{table.num_rows:,} row{'' if table.num_rows == 1 else 's'}"
    hidden = f", the first {limit} shown: --csv or --json prints all" if table.num_rows > limit else ""
    console.print(Text(count + hidden, style="dim"))


def _fits(names: list[str], lines: list[tuple[Any, ...]]) -> bool:
    """Whether every column has its width, or all but the widest, which has enough left to be read."""
    widths = [
        max(len(name), *(len(_cell(line[i])) for line in lines)) + PADDING for i, name in enumerate(map(shown, names))
    ]
    return sum(widths) <= console.width or console.width - (sum(widths) - max(widths)) >= READABLE


def _print_records(names: list[str], lines: list[tuple[Any, ...]]) -> None:
    """More columns than fit beside each other: a block a row, what is null left out."""
    for number, line in enumerate(lines, 1):
        drawn = Table.grid(padding=(0, 2))
        for name, value in zip(names, line, strict=True):
            if value is not None:
                drawn.add_row(Text(shown(name), style="bold"), Text(_cell(value)))
        console.print(Text(f"row {number}", style="dim"), drawn, "")


def _print_table(table: pa.Table, names: list[str], lines: list[tuple[Any, ...]]) -> None:
    drawn = simple_table()
    sizes = {name: max(len(_cell(line[i])) for line in lines) for i, name in enumerate(names)}
    widest = max(sizes, key=lambda name: sizes[name])
    for name, field in zip(names, table.schema, strict=True):
        number = pa.types.is_integer(field.type) or pa.types.is_floating(field.type) or pa.types.is_decimal(field.type)
        drawn.add_column(
            Text(shown(name)), overflow="fold", justify="right" if number else "left", no_wrap=name != widest
        )
    for line in lines:
        drawn.add_row(*(Text(_cell(value), style="dim" if value is None else "") for value in line))
    console.print(drawn)


def _lines(table: pa.Table) -> list[tuple[Any, ...]]:
    columns = [[_plain(value, field) for value in column.to_pylist()] for field, column in _columns(table)]
    return list(zip(*columns, strict=True)) if columns else []


def _columns(table: pa.Table) -> list[tuple[pa.Field, pa.ChunkedArray]]:
    return [(table.schema.field(index), table.column(index)) for index in range(table.num_columns)]


def _plain(value: Any, field: pa.Field) -> Any:
    """A value as JSON has it: no NaN, times in ISO 8601."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    if pa.types.is_map(field.type) and value is not None:
        return dict(value)
    return value


def _cell(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, float):
        return f"{value:.6g}"
    return shown(str(value))


def _unique(names: list[str]) -> list[str]:
    """Names of which each occurs once: a second ``x`` becomes ``x_2``."""
    seen: dict[str, int] = {}
    found = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return found
