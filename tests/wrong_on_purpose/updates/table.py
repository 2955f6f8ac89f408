"""The table of planted faults, which `python -m docs.generate` writes to docs/reference/planted_faults.md."""

from __future__ import annotations

from tests.wrong_on_purpose.updates.catalogue import CATALOGUE


def table() -> str:
    """Return the catalogue as a Markdown table."""
    lines = ["| fault | kind | model | caught by | names |", "|---|---|---|---|---|"]
    for case in CATALOGUE:
        check = case.check if case.outcome == "fail" else f"{case.check} ({case.outcome})"
        lines.append(f"| {case.name} | {case.kind} | {case.architecture} | {check} | {case.parameter or ''} |")
    return "\n".join(lines)
