"""Text that comes from a model, without what could act on a terminal, a page or a reader's eye."""

from __future__ import annotations

import re
from typing import Any

#: Control characters (terminal escapes), surrogates, and characters that reorder or hide text. Tab and newline stay.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufffe\uffff\ud800-\udfff]"
)

#: Characters that XML 1.0 cannot hold.
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def for_xml(text: str) -> str:
    """Return the text without what XML 1.0 cannot hold."""
    return _NO_XML.sub("", text)


def clean(text: str) -> str:
    """Return the text without control, reordering and invisible characters; escaping is left to who shows it."""
    return _UNSAFE.sub("", text)


def neutralised(value: Any) -> Any:
    """Keep a spreadsheet from reading a name as a formula: a leading ``=``, ``+``, ``-`` or ``@`` gets a quote.

    Blanks before it do not count, of whatever kind; characters that are not seen are left out first.
    """
    if not isinstance(value, str):
        return value
    text = clean(value)
    return f"'{text}" if re.match(r"\s*[=+\-@]|[\t\r\n]", text) else text
