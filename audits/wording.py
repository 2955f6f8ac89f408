"""How counts and lists read in a sentence."""

from __future__ import annotations

from collections.abc import Iterable


def and_more(hidden: int, what: str = "more") -> str:
    """Return ``and 3 more`` for what a list leaves out; an empty text where it leaves out nothing."""
    return f"and {hidden:,} {what}" if hidden > 0 else ""


def as_sentence(text: str, name: str | None = None) -> str:
    """Return a text with a capital at its beginning, unless a name stands there: ``name``, or what is no plain word.

    A parameter ``body.0.weight`` is no ``Body.0.weight``, and ``swish's`` is a function's.
    """
    first = text.partition(" ")[0].rstrip(":,;.")
    return text if first == name or not first.isalpha() else text[:1].upper() + text[1:]


def listed(names: Iterable[str], limit: int = 3) -> str:
    """Return the first names for a sentence: ``a, b, c and 2 more``."""
    found = list(names)
    return " ".join(filter(None, (", ".join(found[:limit]), and_more(len(found) - limit))))


def module_label(kind: type, path: str) -> str:
    """Return a module for a reader, ``ScaledGelu (blocks.1.act)``; the model itself by its class alone."""
    return f"{kind.__name__} ({path})" if path else kind.__name__


def plural(count: int, noun: str, many: str | None = None) -> str:
    """Return ``1 tensor``, ``2 tensors``, ``2,000 tensors``."""
    return f"{count:,} {noun if count == 1 else many or noun + 's'}"
