"""``gradaudit check``: the models of a Python file, audited without a registry. Needs `audits` alone."""

from __future__ import annotations

import contextlib
import json
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from audits.errors import InputError
from audits.model_files.annotations import github_annotations, github_command, gitlab_report
from audits.model_files.model_file import AuditedFunction, audit_file, split_target
from audits.model_files.places import Place
from audits.naming import visible
from audits.settings import AuditSettings
from audits.signs import SIGNS
from flows.cli.exit_codes import EXIT_CODES


def run_check(
    target: str,
    *,
    device: str,
    settings: AuditSettings | None = None,
    as_json: bool = False,
    github: bool = False,
    gitlab: Path | None = None,
    out: TextIO,
) -> int:
    """Audit each model of the file, print the reports; return 1 when one fails, 2 when one could not be judged, else 0.

    Args:
        target: ``FILE`` or ``FILE:FUNCTION``.
        device: what the audits run on.
        settings: what to check.
        as_json: print one JSON object instead.
        github: print GitHub's annotations after the reports.
        gitlab: write GitLab's code-quality report there.
        out: where results go; what the file itself prints goes to stderr.

    Raises:
        InputError: there is no such file or function, or it does not return a model and its recipe.
    """
    root = Path.cwd()
    path, function = split_target(target)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            audited = audit_file(path, function, root=root, settings=settings, device=device)
    except InputError as error:
        if github:
            print(github_command("error", "gradaudit could not judge", f"{error}", Place(path, 1), root), file=out)
        raise
    if as_json:
        print(json.dumps(_plain(target, audited, root), indent=2, allow_nan=False), file=out)
    else:
        _print(audited, path, out, guarded=github)
    if github:
        for line in github_annotations(audited, root):
            print(line, file=out)
    if gitlab is not None:
        gitlab.write_text(gitlab_report(audited, root), encoding="utf-8")
    codes = {EXIT_CODES[each.report.outcome] for each in audited}
    return 1 if 1 in codes else max(codes)


def _print(audited: Sequence[AuditedFunction], path: Path, out: TextIO, *, guarded: bool) -> None:
    """Print the reports; ``guarded``, so that no line of theirs is taken for a command of GitHub's runner."""
    token = secrets.token_hex(16)
    if guarded:
        print(f"::stop-commands::{token}", file=out)
    for each in audited:
        print(f"{SIGNS[each.report.outcome]} {path.name}:{visible(each.name)}", file=out)
        for line in str(each.report).splitlines()[:-1]:  # the last one is about Python's properties
            print(f"  {line}", file=out)
    if guarded:
        print(f"::{token}::", file=out)


def _plain(target: str, audited: Sequence[AuditedFunction], root: Path) -> dict[str, object]:
    found = []
    for each in audited:
        told = each.report.to_dict()
        for cause, place in zip(told["causes"], each.places, strict=True):
            file = place.file.relative_to(root).as_posix() if place.file.is_relative_to(root) else str(place.file)
            cause["place"] = {"file": file, "line": place.line, "end": place.end}
        found.append({"function": each.name, **told})
    return {"schema": 1, "target": target, "audits": found}
