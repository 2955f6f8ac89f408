"""Pages that are made of the code are fresh, links lead somewhere, and what pages say of the code is there."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import markdown
import pytest

from audits.checks import CHECKS
from audits.recipe.recipe import EXPECTATIONS
from audits.settings import AuditSettings
from docs.generate import PAGES as GENERATED
from docs.generate import pages
from docs.generate.markdown import plain, table
from flows.settings.environment import GradauditSettings
from tests.docs.blocks import DOCS, PAGES, ROOT, name_of, prose

ROOMS = ("audits", "registry_models", "flows")

#: A file or folder of the repository in backticks, perhaps with the name that stands in it: `audits/run.py:audit`.
_PATH = re.compile(
    r"`((?:audits|registry_models|flows|tests|benchmarks|docs)/[\w/.@-]*|(?:Makefile|prefect\.yaml|constraints\.txt))(?::([\w.]+))?`"
)


@pytest.fixture(scope="module")
def generated() -> dict[str, str]:
    return pages()


@pytest.mark.parametrize("name", GENERATED)
def test_a_generated_page_says_what_the_code_says(name: str, generated: dict[str, str]) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == generated[name], "run: python -m docs.generate"


def test_nothing_is_left_out(generated: dict[str, str]) -> None:
    settings, checks = generated["reference/settings.md"], generated["reference/checks.md"]
    for name in GradauditSettings.model_fields:
        assert f"`GRADAUDIT_{name.upper()}`" in settings
    for name in AuditSettings.__dataclass_fields__:
        assert f"| `{name}` |" in settings
    for name in CHECKS:
        assert f"### {name}\n" in checks
    recipes = (DOCS / "reference" / "recipes.md").read_text(encoding="utf-8")
    assert [name for name in EXPECTATIONS if not re.search(rf"^\| [^|]*`{name}`", recipes, flags=re.M)] == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("|D - <g, v>|", "|D - <g, v>|"),
        ("`|a - n|` of __all__, *not* [x](y)", "<code>|a - n|</code> of __all__, *not* [x](y)"),
        ("snake_case and `<tag>`", "snake_case and <code><tag></code>"),
    ],
)
def test_the_site_shows_a_text_of_the_code_as_it_stands(text: str, shown: str) -> None:
    page = markdown.markdown(table(["text"], [[plain(text)]]), extensions=["tables"])
    assert f"<td>{shown}</td>" in page.replace("&lt;tag&gt;", "<tag>").replace("&lt;g, v&gt;", "<g, v>").replace(
        "&#124;", "|"
    )


def test_no_page_has_a_word_that_the_site_takes_for_a_tag() -> None:
    taken = []
    for page in PAGES:
        for line in prose(page).splitlines():
            found = re.findall(r"<(?!!--|/?code>|br>)[a-z/][^>]*>", re.sub(r"`[^`]*`", "", line))
            taken += [(name_of(page), tag) for tag in found]
    assert taken == []


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


def test_links_outside_the_site_lead_somewhere() -> None:
    """Those of the pages in docs/ are the site's business: a broken one fails its build."""
    broken = []
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)#\s]*)(?:#[\w-]*)?\)", prose(page)):
            gone = not target.startswith("http") and not (page.parent / target).exists()
            broken += [(name_of(page), target)] if gone else []
        for target, anchor in re.findall(r"\]\(([^)#\s]*\.md)#([\w-]+)\)", prose(page)):
            if anchor not in anchors((page.parent / target).read_text(encoding="utf-8")):
                broken.append((name_of(page), f"{target}#{anchor}"))
    assert broken == []


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.replace("`", "")).lower().replace(" ", "-") for heading in headings}


def test_every_path_in_the_text_is_there_and_holds_what_is_named() -> None:
    wrong, found = [], 0
    for page in PAGES:
        for path, name in _PATH.findall(prose(page)):
            found += 1
            place = ROOT / path
            if not place.exists() or (name and name.split(".")[-1] not in place.read_text(encoding="utf-8")):
                wrong.append((name_of(page), path, name))
    assert found > 40
    assert wrong == []


def test_the_pages_that_the_code_names_are_there() -> None:
    named = [
        (path.relative_to(ROOT).as_posix(), page)
        for folder in (*ROOMS, "tests", "benchmarks", "docs")
        for path in (ROOT / folder).rglob("*.py")
        for page in re.findall(r"\bdocs/[\w/]+\.md", path.read_text(encoding="utf-8"))
    ]
    assert len(named) > 5
    assert [(path, page) for path, page in named if not (ROOT / page).exists()] == []


def test_every_python_name_in_the_text_is_there() -> None:
    wrong, found = [], 0
    for page in PAGES:
        for name in re.findall(r"`((?:audits|registry_models|flows)(?:\.\w+)+)[`(]", prose(page)):
            found += 1
            wrong += [] if there(name) else [(name_of(page), name)]
    assert found > 10
    assert wrong == []


def there(name: str) -> bool:
    """Whether a dotted name is a module, or something that a module holds."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[length:]:
            value = getattr(value, attribute, None)
        return value is not None
    return False


def test_the_ten_questions_have_an_answer() -> None:
    """CONTRIBUTING's table names a file for each of the things that newcomers looked for longest."""
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", table, flags=re.M)
    asked = (
        "threshold", "exit code", "add a check", "kinks", "runs in the child", "nightly chooses", "optimizer's rule",
        "snapshot", "marks the registry", "setting is read",
    )  # fmt: skip
    for words in asked:
        answers = [answer for question, answer in rows if words in question]
        assert answers, words
        assert all(_PATH.search(answer) for answer in answers), words
    assert "CONTRIBUTING.md" in (ROOT / "README.md").read_text(encoding="utf-8")


@cache
def messages() -> tuple[str, ...]:
    """Every text in the rooms, with … for what is filled in."""
    found: list[str] = []
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            found += texts(ast.parse(path.read_text(encoding="utf-8")))
    return tuple(found)


def texts(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_messages_and_causes_of_the_troubleshooting_page_are_the_codes() -> None:
    page = (DOCS / "how_to" / "troubleshooting.md").read_text(encoding="utf-8")
    first = [row.split(" | ")[0] for row in re.findall(r"^\| (`.*)$", page, flags=re.M)]
    quoted = [text for cell in first for text in re.findall(r"`([^`]+)`", cell)]
    assert len(quoted) > 40
    unknown = []
    for text in quoted:
        parts = [part for part in text.split("…") if part.strip()]
        pattern = re.compile(".*".join(re.escape(part) for part in parts), flags=re.S)
        if not any(pattern.search(message) for message in messages()):
            unknown.append(text)
    assert unknown == []


def test_lists_stand_apart_from_the_text_before_them() -> None:
    """The site's Markdown takes a list that follows a line of text at once for a part of the sentence."""
    joined = []
    for page in PAGES:
        before = ""
        for line in prose(page).splitlines():
            item = re.match(r"([*-]|\d+\.) ", line)
            if item and before.strip() and not re.match(r"\s|([*-]|\d+\.) ", before):
                joined.append((name_of(page), line))
            before = line
    assert joined == []


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(DOCS, tmp_path / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    return tmp_path


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.end_to_end
def test_the_site_builds_and_asks_nobody_for_anything(copy: Path) -> None:
    done = build(copy)
    assert done.returncode == 0, done.stderr
    site = list((copy / "site").rglob("*.html"))
    assert len(site) > 25
    for page in site:
        for tag in re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page.read_text(encoding="utf-8")):
            assert not re.search(r"(?:src|href)=\"?(?:https?:)?//", tag), f"{page.name}: {tag}"
    for sheet in (copy / "site").rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet.name


@pytest.mark.end_to_end
@pytest.mark.parametrize("target", ["nowhere.md", "glossary.md#nothing"])
def test_a_broken_link_fails_the_build(copy: Path, target: str) -> None:
    page = copy / "docs" / "explanation" / "architecture.md"
    page.write_text(f"{page.read_text()}\n[broken]({target})\n")
    done = build(copy)
    assert done.returncode != 0
    assert target.partition("#")[0] in done.stderr
