"""Findings on the lines at fault, as GitHub and GitLab show them beside a change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from audits.findings.root_causes import RootFinding
from audits.model_files.model_file import AuditedFunction
from audits.model_files.places import Place
from audits.outcomes import Outcome
from audits.wording import as_sentence, listed

#: How a finding is shown on GitHub, and how grave it is on GitLab, by the outcome that counts.
_GITHUB = {Outcome.FAIL: "error", Outcome.INCONCLUSIVE: "warning", Outcome.WARN: "warning"}
_GITLAB = {Outcome.FAIL: "critical", Outcome.INCONCLUSIVE: "major", Outcome.WARN: "minor"}


def github_annotations(audited: Sequence[AuditedFunction], root: Path) -> list[str]:
    """Return one workflow command a finding: ``::error file=...,line=...,title=...::text``.

    An audit that could not judge without a finding of its own has a line of its own, where its function stands.

    Args:
        audited: the audits.
        root: the checkout's folder; files are named from there.
    """
    return [
        github_command(_GITHUB[found.outcome], f"gradaudit: {_title(found)}", _text(each, found), place, root)
        for each, found, place in _findings(audited)
    ]


def github_command(kind: str, title: str, text: str, place: Place | None, root: Path) -> str:
    """Return one workflow command, escaped as GitHub's runner reads it.

    Args:
        kind: ``error``, ``warning`` or ``notice``.
        title: what stands above the text.
        text: may have several lines.
        place: the lines; None for none in particular.
        root: the checkout's folder.
    """
    properties = {"title": title}
    if place is not None:
        properties = {"file": _relative(place.file, root), "line": str(place.line), **properties}
    named = ",".join(f"{name}={_escaped(value, property=True)}" for name, value in properties.items())
    return f"::{kind} {named}::{_escaped(text)}"


def gitlab_report(audited: Sequence[AuditedFunction], root: Path) -> str:
    """Return the findings as a code-quality report, GitLab's JSON.

    Args:
        audited: the audits.
        root: the checkout's folder; files are named from there.
    """
    lines: list[dict[str, Any]] = []
    for each, found, place in _findings(audited):
        file = _relative(place.file, root)
        identity = "\0".join([file, each.name, *found.checks, found.cause])  # not the line: it moves with any change
        lines.append(
            {
                "description": f"{_title(found)}. {_text(each, found)}".replace("\n", " "),
                "check_name": found.checks[0],
                "fingerprint": hashlib.sha256(identity.encode()).hexdigest(),
                "severity": _GITLAB[found.outcome],
                "location": {"path": file, "lines": {"begin": place.line}},
            }
        )
    return json.dumps(lines, indent=2) + "\n"


def _findings(audited: Sequence[AuditedFunction]) -> Iterator[tuple[AuditedFunction, RootFinding, Place]]:
    for each in audited:
        for found, place in zip(each.report.root_findings, each.places, strict=True):
            yield each, found, place


def _title(found: RootFinding) -> str:
    return as_sentence(found.cause)


def _text(each: AuditedFunction, found: RootFinding) -> str:
    row = found.rows[0]
    parts = [f"{row.message} ({', '.join(found.checks)}, {each.name})"]
    if found.parameters:
        parts.append(f"Parameters: {listed(found.parameters)}.")
    if row.where_to_look and found.outcome is Outcome.FAIL:
        parts.append(row.where_to_look)
    return "\n".join(parts)


def _relative(file: Path, root: Path) -> str:
    root = root.resolve()
    return file.relative_to(root).as_posix() if file.is_relative_to(root) else str(file)


def _escaped(text: str, *, property: bool = False) -> str:
    """Escape as the runner's own toolkit does; a line break would begin another command."""
    for character, written in (("%", "%25"), ("\r", "%0D"), ("\n", "%0A")):
        text = text.replace(character, written)
    if property:
        text = text.replace(":", "%3A").replace(",", "%2C")
    return text
