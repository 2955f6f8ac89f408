"""How a registered version is named: to a registry, to a reader, to a shell.

``models:/NAME/VERSION`` looks like a URL and is none. A URL's parser drops tabs and line breaks from it and cuts it at
``?`` and ``#``, and what is left is another model's name; a registry takes all of these in a name, and refuses only
``/`` and ``:``. So a reference is read by what stands around the name, the name itself as it is.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

#: MLflow's names hold neither ``/`` nor ``:``; its aliases are letters, digits, ``_`` and ``-``. So the version is what
#: follows the last ``/``, and an alias what follows the last ``@``, whatever ``@`` the name has.
_BY_VERSION = re.compile(r"models:/(?P<name>[^/:]+)/(?P<version>[0-9]{1,300})")
_BY_ALIAS = re.compile(r"models:/(?P<name>[^/:]+)@(?P<alias>[\w-]+)")

#: How a cure writes the call that registers a model.
_LOG_MODEL = re.compile(r"(log_model\(model, )(?:name|NAME)\b")

#: References as people mistype them: a slash too many or too few, ``v3`` for ``3``.
_NEAR_ALIAS = re.compile(r"models:/*([^/:@]+)/*@([\w-]+)")
_NEAR_VERSION = re.compile(r"models:/*([^/:]+)/+v?([0-9]{1,300})/*")


@dataclass(frozen=True)
class Named:
    """What ``models:/NAME/VERSION`` or ``models:/NAME@ALIAS`` names; one of version and alias is None."""

    name: str
    version: int | None
    alias: str | None


def read_reference(text: str) -> Named | None:
    """Return what a reference names, with the name exactly as it is written; None where the text is no reference."""
    if found := _BY_VERSION.fullmatch(text):
        return Named(found["name"], int(found["version"]), None)
    if found := _BY_ALIAS.fullmatch(text):
        return Named(found["name"], None, found["alias"])
    return None


def no_reference(text: str) -> str:
    """Return why a text names no version, as a sentence with what was probably meant."""
    for pattern, written in ((_NEAR_ALIAS, "models:/{}@{}"), (_NEAR_VERSION, "models:/{}/{}")):
        if found := pattern.fullmatch(text):
            return f"{text!r} does not name a version; did you mean {written.format(*found.groups())!r}?"
    return f"{text!r} does not name a version: write models:/NAME/VERSION or models:/NAME@ALIAS"


def reference_to(name: str, version: int) -> str:
    """Return ``models:/NAME/VERSION``; `read_reference` gives the same name and version back."""
    return f"models:/{name}/{version}"


def label_of(name: str, version: int | None) -> str:
    """Return ``NAME vVERSION`` for a reader."""
    return f"{visible(name)} v{version}"


def label_of_reference(text: str) -> str:
    """Return ``NAME vVERSION`` for a reference, and any other text as it can be seen."""
    named = read_reference(text)
    return visible(text) if named is None or named.version is None else label_of(named.name, named.version)


def with_names(text: str, name: str, version: int) -> str:
    """Return a text in whose cures the version's own name stands, as Python writes it, for the placeholders.

    Whoever writes such a text, an audit's process say, does not know which version it is about.
    """
    reference = repr(reference_to(name, version))
    text = text.replace("'models:/NAME/VERSION'", reference).replace("models:/NAME/VERSION", visible(reference[1:-1]))
    text = text.replace("attach_recipe(VERSION,", f"attach_recipe({reference},")
    return _LOG_MODEL.sub(lambda found: f"{found[1]}{name!r}", text)


def visible(text: str) -> str:
    r"""Return the text on one line, with what cannot be seen or acts on a terminal as an escape such as ``\n``.

    Two names that differ in such a character look different, where leaving it out would make them look the same.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shell_words(words: list[str]) -> str:
    """Return the words as a command for a POSIX shell that survives being shown on one line and copied from there.

    A word that a terminal or a page would not show as it is, such as one with a line break, is written by ``printf``.
    """
    return " ".join(_quoted(word) for word in words)


def _quoted(word: str) -> str:
    if word.isprintable() or word.endswith("\n"):  # "$(...)" takes line breaks off the end
        return shlex.quote(word)
    spelled = "".join(
        {"\\": "\\\\", "%": "%%", "'": "'\\''"}.get(c, c)
        if c.isprintable()
        else "".join(f"\\{byte:03o}" for byte in c.encode("utf-8", "surrogateescape"))
        for c in word
    )
    return f"\"$(printf '{spelled}')\""
