"""Results as CSV on stdout, safe to open in a spreadsheet."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from typing import Any

from flows.output import RESULTS
from registry_models.untrusted_text import clean, neutralised


def print_csv(lines: Sequence[Mapping[str, Any]], names: Sequence[str] = ()) -> None:
    """Print the lines under a header; cells that a spreadsheet would run as a formula get a quote in front.

    Args:
        lines: one mapping a line.
        names: the columns, where there may be no line.
    """
    writer = csv.writer(RESULTS, lineterminator="\n")
    columns = list(names) or list(lines[0]) if lines else list(names)
    writer.writerow(_cell(name) for name in columns)
    for line in lines:
        writer.writerow(_cell(line[name]) for name in columns)


def _cell(value: Any) -> Any:
    if isinstance(value, (dict, list)):
        value = json.dumps(value, default=str)
    return neutralised(clean(value)) if isinstance(value, str) else value
