"""Markdown of what the code says: tables, cells, the sections of docstrings."""

from __future__ import annotations

import html
import inspect
import re
from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [_line(head), _line(["---"] * len(head)), *(_line(row) for row in rows)]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(' '.join(cell.split()) for cell in cells)} |"


#: Characters that Markdown would take for emphasis or links; an underscore within a word is none.
_ACTIVE = re.compile(r"[*\[\]]|(?<![^\W_])_|_(?![^\W_])")


def plain(text: str) -> str:
    """Return a text of the code as Markdown that shows it: no HTML, no emphasis, no cell that ends early."""
    parts = re.split(r"(``?[^`]+``?)", text)
    shown = [code(part.strip("`")) if i % 2 else _ACTIVE.sub(r"\\\g<0>", part) for i, part in enumerate(parts)]
    parts[::2] = [part.replace("<", "&lt;").replace("|", "\\|") for part in shown[::2]]
    parts[1::2] = shown[1::2]
    return "".join(parts).strip()


def code(value: object) -> str:
    """Return a value as code in a table's cell; GitHub and the site read a bar within backticks differently."""
    text = str(value)
    if "|" in text:
        return f"<code>{html.escape(text, quote=False).replace('|', '&#124;')}</code>"
    return f"`{text}`" if text else ""


def default_of(value: object) -> str:
    """Return a default as a table shows it; what is empty is "none"."""
    if value is None or value in ("", (), {}):
        return "none"
    return code(str(value).lower() if isinstance(value, bool) else value)


def sentence(text: str) -> str:
    """Return the text with a full stop at its end, and a capital at its start where that is a word."""
    text = plain(text)
    if re.match(r"[a-z]+ ", text):
        text = text[0].upper() + text[1:]
    return text if not text or text.endswith((".", "?", "!")) else f"{text}."


def sections(doc: str) -> dict[str, str]:
    """Return a Google docstring's sections by name; what comes first has the name ``""``."""
    found = {"": ""}
    name = ""
    for line in inspect.cleandoc(doc).splitlines():
        if match := re.fullmatch(r"(Args|Attributes|Returns|Raises|Yields|Reference|Formula):(.*)", line):
            name = match[1]
            found[name] = match[2].strip() + "\n"
        else:
            found[name] += f"{line}\n"
    return found


def entries_of(section: str) -> list[tuple[str, str]]:
    """Return the entries ``name: text`` of a section, in order."""
    found: list[list[str]] = []
    for line in inspect.cleandoc("\n" + section).splitlines():
        if match := re.match(r"(\*{0,2}[\w.`]+(?: \([^)]*\))?): (.*)", line):
            found.append([match[1], match[2]])
        elif found and line.strip():
            found[-1][1] += f" {line.strip()}"
    return [(name, sentence(text)) for name, text in found]


def attributes(documented: type) -> dict[str, str]:
    """Return the entries of a docstring's ``Attributes``, by name."""
    return dict(entries_of(sections(inspect.getdoc(documented) or "")["Attributes"]))
