"""The commands of an installation without the pipeline: what `audits` alone can do, with the standard library."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

from audits.checks import CHECKS, find_check
from audits.errors import GradauditError, InputError, suggest
from audits.naming import read_reference
from audits.parts import NO_PIPELINE, missing_part
from audits.settings import AuditSettings
from flows.cli.exit_codes import EXIT_CODES

#: The commands that need the pipeline; a test compares them with the whole command line's.
PIPELINE_COMMANDS = (
    "attach",
    "attest",
    "audit",
    "compact",
    "demo",
    "diff",
    "gate",
    "history",
    "nightly",
    "settings",
    "setup",
    "sql",
    "up",
    "watch",
    "webhook",
)

_HELP = ("-h", "--help")


def run_light(arguments: Sequence[str]) -> int:
    """Run one command, and return the exit code: 0 passed, 1 failed, 2 could not judge, or a wrong argument."""
    command = next((word for word in arguments if not word.startswith("-")), "")
    if command in PIPELINE_COMMANDS:
        return _refuse(NO_PIPELINE)
    if command and command not in _COMMANDS:
        known = [*_COMMANDS, *PIPELINE_COMMANDS]
        return _refuse(f"there is no command {command!r}{suggest(command, known)}")
    parser = _parser()
    if not arguments:
        parser.print_help()
        return 2
    given = parser.parse_args(arguments)
    try:
        return int(given.run(given))
    except GradauditError as error:
        return _refuse(f"{error}")
    except ModuleNotFoundError as error:
        if (missing := missing_part(error)) is None:
            raise
        return _refuse(f"{missing}")


def _refuse(text: str) -> int:
    print(f"gradaudit: {text}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gradaudit",
        description="Proves that a PyTorch model can be trained correctly. This installation is the light one.",
        epilog=f"{NO_PIPELINE}; it brings {', '.join(PIPELINE_COMMANDS)}.",
    )
    parser.add_argument("--version", action="version", version=f"gradaudit {metadata.version('gradaudit')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (add, text) in _COMMANDS.items():
        add(commands.add_parser(name, help=text, description=text))
    return parser


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", help="FILE.py: each function audit_... of it; or FILE.py:FUNCTION.")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or any type torch finds.")
    parser.add_argument("--github", action="store_true", help="Annotate the lines at fault, for GitHub Actions.")
    parser.add_argument("--gitlab", type=Path, help="Write a code-quality report, GitLab's JSON file.")
    parser.add_argument("--json", action="store_true", help="Print the result as JSON.")
    parser.set_defaults(run=_check)


def _check(given: argparse.Namespace) -> int:
    from flows.cli.check_command import run_check

    return run_check(
        given.target,
        device=given.device,
        as_json=given.json,
        github=given.github,
        gitlab=given.gitlab,
        out=sys.stdout,
    )


def _add_checks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="Print the result as JSON.")
    parser.set_defaults(run=_checks)


def _checks(given: argparse.Namespace) -> int:
    settings = AuditSettings()
    if given.json:
        print(json.dumps([check.to_dict(settings) for check in CHECKS.values()], indent=2))
        return 0
    width = max(map(len, CHECKS))
    for check in CHECKS.values():
        print(f"{check.name:<{width}}  {check.severity:<4}  {check.claim}")
    return 0


def _add_explain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("check", help="A check's name, such as gradient.finite-difference.")
    parser.add_argument("--json", action="store_true", help="Print the result as JSON.")
    parser.set_defaults(run=_explain)


def _explain(given: argparse.Namespace) -> int:
    check, settings = find_check(given.check), AuditSettings()
    if given.json:
        print(json.dumps(check.to_dict(settings), indent=2))
        return 0
    print(check.name)
    for name, text in check.explanation(settings):
        print(f"  {name:<12}  {text}")
    return 0


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", help="models:/NAME/VERSION, or an audit's id.")
    parser.add_argument("--json", action="store_true", help="Print the result as JSON.")
    parser.add_argument("--results", default="results", help="Results store: a folder or an object-store URI.")
    parser.set_defaults(run=_report)


def _report(given: argparse.Namespace) -> int:
    from audits.history.reading import find_audit, newest_audit, stored_report
    from audits.results.store import ResultsStore

    store, named = ResultsStore(given.results), read_reference(given.target)
    if named is not None and named.version is None:
        raise InputError(f"only a registry knows the alias {named.alias!r}. {NO_PIPELINE}")
    if named is not None:
        line = newest_audit(store, named.name, named.version or 0)
    else:
        line = find_audit(store, given.target)
    report = stored_report(store, line)
    print(json.dumps(report.to_dict(), indent=2) if given.json else report)
    return EXIT_CODES[report.outcome]


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", help="A model directory.")
    parser.add_argument("--key", type=Path, required=True, help="The public key that is believed, PEM.")
    parser.add_argument("--envelope", type=Path, required=True, help="The attestation's file.")
    parser.add_argument("--max-age", help="Believe no audit older than this, such as 30m, 12h or 7d.")
    parser.add_argument("--json", action="store_true", help="Print the result as JSON.")
    parser.set_defaults(run=_verify)


def _verify(given: argparse.Namespace) -> int:
    from flows.cli.verify_command import run_verify

    if given.target.startswith("models:"):
        raise InputError(f"only a registry has {given.target}. {NO_PIPELINE}")
    return run_verify(
        given.target,
        given.key,
        envelope=given.envelope,
        max_age=given.max_age,
        as_json=given.json,
        tracking_uri=None,
        out=sys.stdout,
    )


_COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], str]] = {
    "check": (_add_check, "Audit the models of a Python file: functions that return (model, recipe)."),
    "checks": (_add_checks, "List every check: its claim and its severity."),
    "explain": (_add_explain, "Explain one check: claim, formula, threshold, what it cannot see, where to look."),
    "report": (_add_report, "Show the newest stored audit of a version again, without auditing it."),
    "verify": (_add_verify, "Tell whether an attestation is valid and about exactly the files of a directory."),
}
