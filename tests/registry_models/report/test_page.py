"""The report page as a browser and a reader meet it."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import re
from html.parser import HTMLParser

import pytest

from audits.report import rerun_options
from audits.run import refused
from registry_models.report.changes import Change, Changes
from registry_models.report.rendering import render_html
from tests.registry_models.report.synthetic import HOSTILE, RERUN, report_of

#: Elements that have no end tag, or whose end tag HTML lets a writer leave out.
_VOID = {"meta", "input", "br", "wbr", "path", "td", "link", "img"}


class Page(HTMLParser):
    """What a page holds: text, elements with attributes, and whether its elements are nested properly."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.inside: list[str] = []
        self.raw: dict[str, str] = {"style": "", "script": ""}
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self.inside.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.inside and self.inside[-1] in self.raw:
            self.raw[self.inside[-1]] += data
        else:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


CHANGES = Changes(
    against="v1, audited 2026-01-30",
    cause="recipe (optimizer), weights",
    counts=(("new", 1), ("fixed", 1)),
    listed=(
        Change(
            parameter="b.weight", check="gradient.finite-difference", kind="new", turned="pass → fail", cause="code"
        ),
        Change(parameter="a.weight", check="update.rule", kind="fixed", turned="fail → pass", cause="recipe"),
    ),
)


def test_the_sections_are_in_order() -> None:
    page = Page(render_html(report_of(5, failing=(2,)), rerun=RERUN, changes=CHANGES))
    sections = [section["id"] for section in page.all("section") if "id" in section]
    assert sections == ["verdict", "coverage", "findings", "picture", "changes", "parameters", "provenance"]
    assert page.inside == []


def test_without_changes_there_is_no_such_section() -> None:
    html = render_html(report_of(5), rerun=RERUN)
    assert "Since the last audited version" not in html
    assert "No finding is new" in render_html(report_of(5), rerun=RERUN, changes=Changes(against="v1", cause="weights"))


def test_changes_say_against_what_and_why() -> None:
    words = Page(render_html(report_of(5), rerun=RERUN, changes=CHANGES)).words
    assert "Held against v1, audited 2026-01-30. Differs: recipe (optimizer), weights." in words
    assert words.index("b.weight") < words.index("a.weight")
    assert "pass → fail" in words
    many = dataclasses.replace(CHANGES, counts=(("new", 2000),))
    assert "1,998 more changes" in Page(render_html(report_of(5), rerun=RERUN, changes=many)).words


def test_every_finding_has_parameter_module_message_numbers_and_command() -> None:
    report = report_of(148, failing=(3, 4, 5, 6, 7), inconclusive=(50, 51), warned=(60, 61))
    words = Page(render_html(report, rerun=RERUN)).words
    found = report.findings
    assert len(found) == 9
    for row in found:
        assert row.parameter in words
        assert row.module in words
        assert row.message in words
        assert RERUN.format(options=rerun_options(row)) in words
    assert "does not train correctly" in words


def test_every_parameter_has_one_line_with_an_outcome_in_words() -> None:
    report = report_of(148, failing=(3,))
    page = Page(render_html(report, rerun=RERUN))
    lines = [row for row in page.all("tr") if str(row.get("id", "")).startswith("p")]
    assert len(lines) == 148
    assert [line["data-o"] for line in lines].count("fail") == 1


def test_what_was_not_checked_is_said_with_its_reason() -> None:
    words = Page(render_html(report_of(5), rerun=RERUN)).words
    assert "step.clippingthe recipe declares no clipping" in words


@pytest.mark.parametrize("where", ["parameter", "module", "message", "cause", "where_to_look", "check", "phase"])
def test_names_cannot_leave_their_place(where: str) -> None:
    report = report_of(names=list(HOSTILE), failing=tuple(range(len(HOSTILE))))
    hostile = "".join(HOSTILE)
    rows = tuple(dataclasses.replace(row, **{where: hostile}) for row in report.rows)
    identity = dataclasses.replace(report.identity, model_name=hostile, device=hostile)
    report = dataclasses.replace(report, rows=rows, identity=identity, provenance={hostile: hostile})
    html = render_html(
        report,
        rerun="gradaudit audit x {options}",
        recipe_yaml=hostile,
        links={hostile: "#/runs/1"},
        changes=Changes(
            against=hostile,
            cause=hostile,
            counts=((hostile, 1),),
            listed=(Change(parameter=hostile, check=hostile, kind="new", turned=hostile, cause=hostile),),
        ),
    )
    page = Page(html)
    assert len(page.all("script")) == 1
    assert page.all("img") == []
    assert "{{ 7 * 7 }}" in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", html)
    for _, attributes in page.elements:
        assert not any(name.startswith("on") or name == "style" for name in attributes)


def test_nothing_is_loaded_from_anywhere() -> None:
    links = {"the run": "#/experiments/1/runs/2", "the server": "https://mlflow.example/x"}
    page = Page(render_html(report_of(148, failing=(3,)), rerun=RERUN, links=links))
    addresses = [
        a[name] for _, a in page.elements for name in ("src", "href", "action", "srcset", "data") if a.get(name)
    ]
    assert [a for a in addresses if not str(a).startswith("#")] == ["https://mlflow.example/x"]
    assert not re.search(r"url\(|@import", page.raw["style"])
    assert not re.search(r"https?://|fetch\(|XMLHttp|innerHTML|eval\(", page.raw["script"])


def test_the_policy_names_the_style_and_script_and_nothing_else() -> None:
    page = Page(render_html(report_of(5), rerun=RERUN))
    policy = next(str(m["content"]) for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    for kind in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(page.raw[kind].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy


@pytest.mark.parametrize("address", ["javascript:alert(1)", "data:text/html,x", " javascript:x", "vbscript:x"])
def test_a_link_that_could_run_something_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="relative"):
        render_html(report_of(5), rerun=RERUN, links={"x": address})


def test_every_link_within_the_page_leads_somewhere() -> None:
    page = Page(render_html(report_of(148, failing=tuple(range(20)), warned=(30,)), rerun=RERUN))
    ids = [str(a["id"]) for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {str(a["href"])[1:] for a in page.all("a")} <= set(ids)


def test_tables_have_captions_and_headers_with_scope() -> None:
    report = report_of(148, failing=tuple(range(20)))
    page = Page(render_html(report, rerun=RERUN, changes=CHANGES))
    assert len(page.all("caption")) == len(page.all("table")) == 4
    assert all(header.get("scope") in ("col", "row", "rowgroup") for header in page.all("th"))
    assert all(button.get("type") == "button" for button in page.all("button"))
    assert next(svg for svg in page.all("svg") if svg.get("role") == "img")["aria-label"]


@pytest.mark.slow
def test_two_thousand_tensors_stay_light_even_if_all_fail() -> None:
    html = render_html(report_of(2000, failing=tuple(range(2000))), rerun=RERUN)
    assert len(html.encode()) < 3_000_000
    assert len([row for row in Page(html).all("tr") if str(row.get("id", "")).startswith("p")]) == 2000


def test_an_audit_that_could_not_run_still_has_a_page() -> None:
    page = Page(render_html(refused("the model's file is corrupt"), rerun=RERUN))
    assert "The model could not be judged." in page.words
    assert "the model's file is corrupt" in page.words
    assert "did not get as far as a parameter" in page.words
    assert "No tensor was measured" in page.words


def test_infinite_and_missing_numbers_are_said_in_words() -> None:
    report = report_of(5, failing=(1,))
    broken = {"measured": float("nan"), "error": float("inf"), "gradient_norm": float("inf"), "update_norm": None}
    rows = tuple(dataclasses.replace(row, **broken) if row.parameter else row for row in report.rows)
    words = Page(render_html(dataclasses.replace(report, rows=rows), rerun=RERUN)).words
    assert "not a number" in words


def test_a_pass_says_so_in_the_first_sentence() -> None:
    words = Page(render_html(report_of(5), rerun=RERUN)).words
    assert "char-gpt v2 trains correctly" in words
    assert "None: every judged claim holds." in words
