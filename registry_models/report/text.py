"""Names and numbers as text: what a model named itself is never trusted, what was measured is never overstated."""

from __future__ import annotations

import math
import re

from registry_models.untrusted_text import clean

_SPECIAL = re.compile(r"([\\`*_\[\]<>|~&$])")

#: What GitHub's kind of markdown makes a link of, and what begins a block.
_ADDRESS = re.compile(r"(?i)\b[a-z][a-z0-9+.-]*://|\bwww\.|\b(?:mailto|xmpp):")
_BEGINS = re.compile(r"^(\d*)([.)](?=\s|$)|[#+=-](?=[#+=\s-]*(?:\s|$)))")

MISSING = "–"


def one_line(text: str) -> str:
    """Return the cleaned text on one line."""
    return " ".join(clean(text).split())


def escape_markdown(text: str) -> str:
    """Return a text that comes from a model as one line of plain markdown: no markup, no HTML, no formula, no link.

    Addresses would become links by themselves; a heading, a list or a line begins with its first characters.
    """
    escaped = _SPECIAL.sub(r"\\\1", one_line(text))
    return _BEGINS.sub(r"\1\\\2", _ADDRESS.sub(lambda found: found[0].replace(":", r"\:").replace(".", r"\."), escaped))


def shortened(text: str, limit: int) -> str:
    """Return at most ``limit`` characters; what is left out shows as an ellipsis in the middle."""
    if len(text) <= limit:
        return text
    head = (limit - 1) // 2
    return f"{text[:head]}…{text[len(text) - (limit - 1 - head) :]}"


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with ``digits`` significant digits; a dash when there is none, words when it is not finite."""
    if value is None:
        return MISSING
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite" if value > 0 else "-infinite"
    if value == 0:
        return "0"
    if float(value).is_integer() and abs(value) < 1e6:
        return f"{int(value):d}"
    if 1e-3 <= abs(value) < 1e5:
        plain = f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"
        return plain.rstrip("0").rstrip(".") if "." in plain else plain
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent):d}"


def times(error: float | None, threshold: float | None) -> str | None:
    """Return how many times the threshold the error is, for an error above it; None where that says nothing."""
    if error is None or not threshold or not math.isfinite(error) or abs(error) <= threshold:
        return None
    return f"{number(abs(error) / threshold, 2)} times"


def duration(seconds: float) -> str:
    """Return seconds as ``0.4 s``, ``41 s`` or ``3 min 20 s``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
