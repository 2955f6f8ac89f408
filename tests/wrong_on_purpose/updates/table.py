"""The table of planted faults in docs/update_audit.md; ``python -m tests.wrong_on_purpose.updates.table`` writes it."""

from __future__ import annotations

from pathlib import Path

from tests.wrong_on_purpose.updates.catalogue import CATALOGUE

DOCUMENT = Path(__file__).parents[3] / "docs" / "update_audit.md"
BEGIN, END = "<!-- planted faults: begin -->", "<!-- planted faults: end -->"


def table() -> str:
    """Return the catalogue as a Markdown table."""
    lines = ["| fault | kind | model | caught by | names |", "|---|---|---|---|---|"]
    for case in CATALOGUE:
        check = case.check if case.outcome == "fail" else f"{case.check} ({case.outcome})"
        lines.append(f"| {case.name} | {case.kind} | {case.architecture} | {check} | {case.parameter or ''} |")
    return "\n".join(lines)


def written(document: str) -> str:
    """Return the document with the table between its marks replaced."""
    head, _, rest = document.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{len(CATALOGUE)} faults, each with a correct twin that passes.\n\n{table()}\n{END}{tail}"


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text()))
