"""The code blocks of README and of the pages of docs/, as a reader sees them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"

#: The pages a reader meets; a design or a changelog is none.
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]

#: Before a block that no test can run, with the reason.
_NOT_RUN = re.compile(r"<!-- not run: (.+?) -->\s*$")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: where it stands.
        line: the line of its fence.
        language: what follows the fence: ``python``, ``console``, or nothing.
        text: what is inside.
        not_run: why no test runs it, if none does.
    """

    page: Path
    line: int
    language: str
    text: str
    not_run: str | None

    @property
    def place(self) -> str:
        return f"{name_of(self.page)}:{self.line}"

    @property
    def file(self) -> str | None:
        """The file that the block says it is, in a comment on its first line."""
        found = re.match(r"# ([\w/]+\.py)\n", self.text)
        return found[1] if found else None


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> Iterator[Block]:
    """Yield the page's fenced blocks in order."""
    before, inside, start, language = "", None, 0, ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if inside is not None and line.strip() == "```":
            reason = _NOT_RUN.search(before)
            yield Block(page, start, language, "".join(inside), reason[1] if reason else None)
            before, inside = "", None
        elif inside is not None:
            inside.append(f"{line}\n")
        elif line.startswith("```"):
            inside, start, language = [], number, line[3:].strip()
        elif line.strip():
            before = line
    assert inside is None, f"{name_of(page)}:{start}: the block has no end"


def prose(page: Path) -> str:
    """Return the page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
