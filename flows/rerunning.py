"""The command that repeats an audit."""

from __future__ import annotations

from audits.naming import shell_words


def rerun_of(target: str, tracking_uri: str | None = None) -> str:
    """Return the command, quoted for a POSIX shell, with ``{options}`` for what narrows it; braces are doubled.

    Args:
        target: ``models:/NAME/VERSION`` or a directory.
        tracking_uri: of the registry; None for a directory.
    """
    place = [] if tracking_uri is None else ["--tracking-uri", tracking_uri]
    return shell_words(["gradaudit", "audit", target, *place]).replace("{", "{{").replace("}", "}}") + " {options}"
