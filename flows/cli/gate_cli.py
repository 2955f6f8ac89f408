"""The commands by which others decide, a promotion or a pull request: ``check``, ``gate``, ``attest``, ``verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.options import AsJson, Results, TrackingUri
from flows.cli.targets import refuse_reference


def check(
    target: Annotated[str, typer.Argument(help="FILE.py: each function audit_... of it; or FILE.py:FUNCTION.")],
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or any type torch finds.")] = None,
    github: Annotated[
        bool, typer.Option("--github", help="Annotate the lines at fault, as GitHub Actions reads it from stdout.")
    ] = False,
    gitlab: Annotated[Path | None, typer.Option(help="Write a code-quality report, GitLab's JSON file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Audit the models of a Python file without a registry: functions that return (model, recipe).

    The file is imported and run in this process, as a test is: check what you would run. Exit codes: 0 all pass, 1 one
    fails, 2 one could not be judged.
    """
    from flows.arguments import refuse_device, refuse_output
    from flows.cli.check_command import run_check
    from flows.output import RESULTS
    from flows.settings.environment import GradauditSettings

    refuse_output(gitlab, "--gitlab")
    settings = GradauditSettings.load(device=device)
    refuse_device(settings.device)
    code = run_check(
        target,
        device=settings.device,
        settings=settings.audit_settings,
        as_json=as_json,
        github=github,
        gitlab=gitlab,
        out=RESULTS,
    )
    raise typer.Exit(code)


def gate(
    target: Annotated[str, typer.Argument(help="models:/NAME/VERSION or models:/NAME@ALIAS.")],
    max_age: Annotated[
        str | None, typer.Option(help="Believe no audit older than this, such as 30m, 12h or 7d.")
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Seconds to wait for an audit that others make; the setting time_limit otherwise, 0 with --no-audit.",
        ),
    ] = None,
    no_audit: Annotated[bool, typer.Option("--no-audit", help="Make no audit: believe what there is.")] = False,
    require_attestation: Annotated[
        bool, typer.Option("--require-attestation", help="Believe only a valid attestation of exactly these files.")
    ] = False,
    key: Annotated[Path | None, typer.Option(help="The public key whose attestations are believed, PEM.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or any type torch finds.")] = None,
    as_json: AsJson = False,
    tracking_uri: TrackingUri = None,
    results: Results = None,
) -> None:
    """Tell whether a version may be promoted, by the audit of exactly this version and environment; make it if need be.

    Exit codes: 0 the version passes, 1 it fails, 2 it could not be judged or has no audit.
    """
    refuse_reference(target)
    from audits.errors import SettingsError
    from flows.ages import age_of
    from flows.settings.environment import GradauditSettings

    age = None if max_age is None else age_of(max_age, "--max-age")
    settings = GradauditSettings.load(tracking_uri=tracking_uri, results=results, device=device)
    if require_attestation != (key is not None):
        raise SettingsError("--require-attestation and --key belong together: give both, with the public key")
    from flows.cli.gate_command import run_attested_gate, run_gate

    if key is not None:
        raise typer.Exit(run_attested_gate(target, settings, key, max_age=age, as_json=as_json))
    raise typer.Exit(run_gate(target, settings, max_age=age, timeout=timeout, make=not no_audit, as_json=as_json))


def attest(
    target: Annotated[str, typer.Argument(help="models:/NAME/VERSION or models:/NAME@ALIAS.")],
    key: Annotated[Path, typer.Option(help="The private key that signs, PEM.")],
    expires: Annotated[str | None, typer.Option(help="How long it is valid, such as 12h or 30d.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the attestation into this file as well.")] = None,
    as_json: AsJson = False,
    tracking_uri: TrackingUri = None,
    results: Results = None,
) -> None:
    """Sign a version's newest audit with the digest of its files, and keep the attestation beside the audit's run."""
    refuse_reference(target)
    from flows.ages import age_of
    from flows.arguments import refuse_output
    from flows.settings.environment import GradauditSettings

    refuse_output(out, "--out")
    valid = None if expires is None else age_of(expires, "--expires")
    settings = GradauditSettings.load(tracking_uri=tracking_uri, results=results)
    from flows.cli.attest_command import run_attest

    raise typer.Exit(run_attest(target, settings, key, expires_in=valid, out=out, as_json=as_json))


def verify(
    target: Annotated[str, typer.Argument(help="A model directory, models:/NAME/VERSION or models:/NAME@ALIAS.")],
    key: Annotated[Path, typer.Option(help="The public key that is believed, PEM.")],
    envelope: Annotated[
        Path | None, typer.Option(help="The attestation's file; the one beside the audit's run otherwise.")
    ] = None,
    max_age: Annotated[
        str | None, typer.Option(help="Believe no audit older than this, such as 30m, 12h or 7d.")
    ] = None,
    as_json: AsJson = False,
    tracking_uri: TrackingUri = None,
) -> None:
    """Tell whether an attestation is valid and about exactly these files; of a directory without asking anybody.

    Exit codes: 0 valid and the version passed, 1 valid and it failed, 2 it was not judged, or there is none; refused: 3
    wrong signature, 4 another key, 5 other files or another version, 6 expired, 7 no statement about an audit.
    """
    from flows.cli.verify_command import run_verify

    if target.startswith("models:"):
        refuse_reference(target)
        from flows.settings.environment import GradauditSettings

        uri: str | None = GradauditSettings.load(tracking_uri=tracking_uri).tracking_uri
    else:
        uri = None
    from flows.output import RESULTS

    code = run_verify(target, key, envelope=envelope, max_age=max_age, as_json=as_json, tracking_uri=uri, out=RESULTS)
    raise typer.Exit(code)


def add_gate_commands(app: typer.Typer) -> None:
    """Add them to the command line, in the order of its help."""
    for command in (check, gate, attest, verify):
        app.command()(command)
