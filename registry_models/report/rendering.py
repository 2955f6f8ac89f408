"""The report page: one file with its style, script and picture inside, and a policy that lets nothing else in."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from jinja2 import BaseLoader, Environment, StrictUndefined, Template
from markupsafe import Markup

from audits.report import AuditReport
from audits.wording import plural
from registry_models.report.changes import Changes
from registry_models.report.page import page_of
from registry_models.report.picture import picture
from registry_models.report.text import MISSING, number
from registry_models.untrusted_text import clean

#: Addresses a link may have: the web, or a place in the page or server that shows the report.
_ADDRESS = re.compile(r"(?:https?://|[#/.?]|[\w-]+(?:[/?#.]|$))", re.ASCII)


def render_html(
    report: AuditReport,
    *,
    rerun: str,
    recipe_yaml: str | None = None,
    links: Mapping[str, str] | None = None,
    changes: Changes | None = None,
) -> str:
    """Return the report as one self-contained page.

    Args:
        report: the audit.
        rerun: the command that repeats it, with ``{options}`` in it for what narrows it to one finding.
        recipe_yaml: the recipe as text, shown folded.
        links: text -> address, shown under the verdict; only web addresses and relative ones.
        changes: what changed since the last audited version; without it the page has no such section.

    Returns:
        HTML that loads nothing: style and script are inside and named by digest in the page's content security
        policy, so that nothing a model calls itself could ever run.

    Raises:
        ValueError: a link is neither a web address nor relative.
    """
    for address in (links or {}).values():
        if not _ADDRESS.match(address):
            raise ValueError(f"{address!r} is neither a web address nor a relative one")
    page = page_of(report, rerun=rerun, recipe_yaml=recipe_yaml, links=links, changes=changes)
    style, script = _asset("report.css"), _asset("report.js")
    return _page_template().render(
        page=page,
        identity=report.identity,
        picture=picture(page.lines),
        style=Markup(style),
        script=Markup(script),
        policy=f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}; "
        "img-src 'none'; base-uri 'none'; form-action 'none'",
    )  # fmt: skip


@functools.cache
@functools.cache
def _page_template() -> Template:
    """Compiled once: a night renders a thousand pages."""
    return _environment().from_string(_asset("report.html.j2"))


def _environment() -> Environment:
    environment = Environment(
        loader=BaseLoader(), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined,
        finalize=_cleaned,
    )  # fmt: skip
    environment.filters.update(number=number, plural=plural)
    environment.globals["missing"] = MISSING
    return environment


def _cleaned(value: Any) -> Any:
    """Strip what must not reach a page from every text the template shows; escaping follows."""
    return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


@functools.cache
def _asset(name: str) -> str:
    return (files("registry_models.report") / "templates" / name).read_text(encoding="utf-8").replace("\r\n", "\n")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
