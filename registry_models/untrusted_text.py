"""Text that comes from a model, without what could act on a terminal, a page or a reader's eye."""

from __future__ import annotations

import re
from typing import Any

#: Control characters (terminal escapes), surrogates, and characters that reorder or hide text. Tab and newline stay.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")


def clean(text: str) -> str:
    """Return the text without control, reordering and invisible characters; escaping is left to who shows it."""
    return _UNSAFE.sub("", text)


def neutralised(value: Any) -> Any:
    """Keep a spreadsheet from reading a name as a formula: a leading ``=``, ``+``, ``-`` or ``@`` gets a quote."""
    return f"'{value}" if isinstance(value, str) and re.match(r"[=+\-@\t\r]", value) else value
