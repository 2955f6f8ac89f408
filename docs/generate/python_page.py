"""docs/reference/python.md: what may be imported, with its signatures and docstrings."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import audits
import registry_models
from docs.generate.markdown import code, entries_of, plain, sections, table


def python_page() -> str:
    """Return what may be imported: signatures and docstrings of the public names."""
    parts = [
        "# Python",
        "What outside code may rely on. Everything else may change. [Audit your own model](../how_to/own_model.md) "
        "shows it at work.",
    ]
    for package in (audits, registry_models):
        assert package.__doc__
        parts += [f"## {package.__name__}", plain(inspect.cleandoc(package.__doc__).split("\n\n")[0])]
        for name in sorted(package.__all__, key=str.lower):
            parts += _documented(f"{package.__name__}.{name}", getattr(package, name))
    return "\n\n".join(parts)


#: Methods and properties that are documented besides a class's own text.
_MEMBERS = {
    "audits.Recipe": ["capture"],
    "audits.AuditReport": [
        "outcome",
        "passed",
        "coverage",
        "headline",
        "findings",
        "not_checked",
        "counts",
        "failed_checks",
        "failed_parameters",
        "to_frame",
        "to_dict",
    ],
}


def _documented(name: str, value: Any) -> list[str]:
    parts = [f"### {name}"]
    is_enum = isinstance(value, type) and hasattr(value, "__members__")
    if not isinstance(value, type):
        parts.append(_call(name, value))
    parts += _prose(inspect.getdoc(value) or "")
    if is_enum:
        parts.append("Values: " + ", ".join(code(member.value) for member in value))
    for member in _MEMBERS.get(name, ()):
        found = inspect.getattr_static(value, member)
        function = found.fget if isinstance(found, property) else getattr(value, member)
        parts.append(f"#### {name.partition('.')[2]}.{member}")
        if not isinstance(found, property):
            parts.append(_call(f"{name}.{member}", function))
        parts += _prose(inspect.getdoc(function) or "")
    return parts


def _call(name: str, function: Callable[..., Any]) -> str:
    arguments = []
    starred = False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            arguments, starred = [*arguments, "*"], True
        starred |= parameter.kind is parameter.VAR_POSITIONAL
        arguments.append(str(parameter.replace(annotation=parameter.empty)))
    line = f"{name}({', '.join(arguments)})"
    if len(line) > 100:
        line = f"{name}(\n    " + ",\n    ".join(arguments) + ",\n)"
    return f"```\n{line}\n```"


def _prose(doc: str) -> list[str]:
    parts = []
    for name, text in sections(doc).items():
        entries = entries_of(text) if name in ("Args", "Attributes", "Raises") else []
        if entries:
            title = {"Args": "argument", "Attributes": "attribute", "Raises": "raised"}[name]
            parts.append(table((title, "meaning"), [(code(entry), said) for entry, said in entries]))
        elif text.strip():
            label = f"*{name}*: " if name else ""
            parts.append(label + "\n\n".join(_paragraph(one) for one in text.strip().split("\n\n")))
    return parts


def _paragraph(text: str) -> str:
    """Return a docstring's paragraph; one that is a drawing or code stays as it stands."""
    if text.startswith(("```", "    ")):
        return text
    return plain(" ".join(text.split()))
