"""The pages of docs/reference/ that are made of the code. `python -m docs.generate` writes them."""

from __future__ import annotations

MARK = "<!-- Written by `python -m docs.generate` from the code: change the code, then run it. -->\n"


#: The generated pages, by path below docs/.
PAGES = tuple(f"reference/{name}.md" for name in ("settings", "commands", "checks", "python", "planted_faults"))


def pages() -> dict[str, str]:
    """Return the text of every generated page by its path below docs/."""
    from audits.checks import CHECKS
    from docs.generate.checks_page import checks_page
    from docs.generate.commands_page import commands_page
    from docs.generate.faults_page import planted_faults_page
    from docs.generate.python_page import python_page
    from docs.generate.settings_page import settings_page

    texts = (settings_page(), commands_page(), checks_page(CHECKS.values()), python_page(), planted_faults_page())
    return {name: f"{MARK}\n{text.strip()}\n" for name, text in zip(PAGES, texts, strict=True)}
