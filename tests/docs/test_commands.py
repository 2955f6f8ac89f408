"""Every ``gradaudit`` command of README and docs is one; documented settings, waivers and SQL are read."""

from __future__ import annotations

import datetime
import inspect
import re
import shlex
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml

from audits.results.queries import query
from audits.results.store import ResultsStore
from audits.waivers import waivers_from_plain
from docs.generate.commands_page import commands
from flows.settings.environment import GradauditSettings
from tests.docs.blocks import DOCS, PAGES, blocks, name_of, prose
from tests.docs.prepared import store_results

#: Options that every command has.
HELP = {"--help", "-h"}


def written() -> Iterator[tuple[str, str]]:
    """Yield place and text of every command in a block; what follows two spaces explains it."""
    for page in PAGES:
        for block in blocks(page):
            if page.name == "commands.md":  # what it says is made of the command line itself
                continue
            if block.language not in ("", "console", "bash", "sh"):
                continue
            for line in block.text.splitlines():
                found = re.match(r"(?:\$ )?(?:[A-Z_]+=\S+ )*(gradaudit\b.*)", line)
                if found:
                    yield block.place, re.split(r"\s{2,}|\s+#", found[1])[0]


def mentioned() -> Iterator[tuple[str, str]]:
    """Yield place and text of every command in running text; it may lack its arguments."""
    for page in PAGES:
        for found in re.finditer(r"`(?:[A-Z_]+=\S+ )*(gradaudit [a-z][^`]*)`", prose(page)):
            yield name_of(page), found[1].replace("\n", " ").replace("\\|", "|")


def mistake(text: str, *, whole: bool) -> str | None:
    """Return what the command line would not take of a command, or None."""
    words = shlex.split(text)[1:]
    if not words or words[0].startswith("--"):
        return None if set(words) <= {*HELP, "--version"} else f"no option {words}"
    if words[0] not in commands():
        return f"no command {words[0]!r}"
    options: dict[str, bool] = {}
    arguments, required = 0, 0
    for name, parameter in inspect.signature(commands()[words[0]]).parameters.items():
        hint = typing.get_type_hints(commands()[words[0]], include_extras=True)[name]
        info = next(extra for extra in hint.__metadata__ if isinstance(extra, typer.models.ParameterInfo))
        if isinstance(info, typer.models.ArgumentInfo):
            arguments, required = arguments + 1, required + (parameter.default is parameter.empty)
            continue
        given = [info.default] if isinstance(info.default, str) else []
        for flag in [*given, *(info.param_decls or [])] or [f"--{name.replace('_', '-')}"]:
            options[flag] = parameter.default is not False  # whether a value follows
    rest, found = iter(words[1:]), 0
    for word in rest:
        flag, equals, _ = word.partition("=")
        if flag in HELP:
            continue
        if not flag.startswith("--"):
            found += 1
        elif flag not in options:
            return f"{words[0]} has no option {flag}"
        elif options[flag] and not equals and next(rest, None) is None and whole:
            return f"{flag} lacks its value"
    if found > arguments or (whole and found < required):
        return f"{words[0]} takes {required} to {arguments} arguments, not {found}"
    return None


def test_every_command_in_a_block_is_one() -> None:
    found = list(written())
    assert len(found) > 15
    assert [(place, text, why) for place, text in found if (why := mistake(text, whole=True))] == []


def test_every_command_in_the_text_is_one() -> None:
    found = list(mentioned())
    assert len(found) > 15
    assert [(place, text, why) for place, text in found if (why := mistake(text, whole=False))] == []


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("gradaudit audti models:/m/1", "no command"),
        ("gradaudit audit models:/m/1 --jnuit x.xml", "no option --jnuit"),
        ("gradaudit audit", "takes 1 to 1 arguments, not 0"),
        ("gradaudit diff a b c", "takes 2 to 2 arguments, not 3"),
        ("gradaudit audit models:/m/1 --junit", "lacks its value"),
    ],
)
def test_a_wrong_command_is_found(text: str, why: str) -> None:
    assert why in (mistake(text, whole=True) or "")


def test_the_documented_settings_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (toml,) = [b.text for b in blocks(DOCS / "how_to" / "configure.md") if b.language == "toml"]
    (tmp_path / "gradaudit.toml").write_text(toml)
    monkeypatch.chdir(tmp_path)
    settings = GradauditSettings.load()
    assert settings.results == "s3://audits/results"
    assert settings.for_model("team-a").detection_limit == 1e-2


def test_the_documented_waiver_is_read() -> None:
    (text,) = [b.text for b in blocks(DOCS / "how_to" / "waive.md") if b.language == "yaml"]
    (waiver,) = waivers_from_plain(yaml.safe_load(text), source="waivers.yaml")
    assert waiver.expires == datetime.date(2027, 6, 30)


def test_the_documented_queries_run(tmp_path: Path) -> None:
    store_results(tmp_path)
    asked = [b.text for page in PAGES for b in blocks(page) if b.language == "sql"]
    statements = [one for text in asked for one in text.split(";") if one.strip()]
    assert len(statements) >= 3
    for statement in statements:
        query(ResultsStore(tmp_path), statement)
