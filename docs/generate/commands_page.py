"""docs/reference/commands.md: every command, its arguments and its options."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from typing import Any

import typer

from docs.generate.markdown import code, plain, sentence, table
from flows.cli.main import app


def commands_page() -> str:
    """Return every command with its arguments and options."""
    assert app.info.epilog
    parts = [
        "# Commands",
        "`gradaudit COMMAND --help` prints the same. stdout carries the result, stderr the log and the progress. "
        + plain(app.info.epilog),
        "How to use them: [audit your own model](../how_to/own_model.md), "
        "[ask stored results](../how_to/query_results.md), "
        "[deploy](../how_to/deploy.md).",
    ]
    for name, function in commands().items():
        arguments, options = [], []
        for parameter, info, default in _parameters(function):
            if isinstance(info, typer.models.ArgumentInfo):
                arguments.append((code(parameter.upper()), sentence(info.help or "")))
            else:
                options.append(
                    (
                        code(_flag(parameter, info)),
                        "" if default in (None, False) else code(default),
                        _bounds(info) + sentence(info.help or ""),
                    )
                )
        called = " ".join(
            [f"gradaudit {name}", *(cell.strip("`") for cell, _ in arguments), *(["[OPTIONS]"] if options else [])]
        )
        parts += [f"## {name}", plain(inspect.getdoc(function) or ""), f"```\n{called}\n```"]
        parts += [table(("argument", "meaning"), arguments)] if arguments else []
        parts += [table(("option", "default", "meaning"), options)] if options else []
    return "\n\n".join(parts)


def commands() -> dict[str, Callable[..., Any]]:
    """Return the functions behind the commands, by name, in the order of the help."""
    found = ((known.name, inspect.unwrap(known.callback)) for known in app.registered_commands if known.callback)
    return {name or function.__name__.replace("_", "-"): function for name, function in found}


def _parameters(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    hints = typing.get_type_hints(function, include_extras=True)
    found = []
    for name, parameter in inspect.signature(function).parameters.items():
        info = next(extra for extra in hints[name].__metadata__ if isinstance(extra, typer.models.ParameterInfo))
        found.append((name, info, parameter.default))
    return found


def _flag(name: str, info: typer.models.OptionInfo) -> str:
    given = [info.default] if isinstance(info.default, str) else []  # in Annotated, the first name stands there
    return ", ".join([*given, *(info.param_decls or [])] or [f"--{name.replace('_', '-')}"])


def _bounds(info: typer.models.OptionInfo) -> str:
    if info.min is None:
        return ""
    return f"From {info.min:g} to {info.max:g}. " if info.max is not None else f"At least {info.min:g}. "
