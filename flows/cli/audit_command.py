"""``gradaudit audit``: one version or directory, now, without Prefect."""

from __future__ import annotations

import dataclasses
import importlib
import threading
from pathlib import Path
from typing import Any

from audits.errors import ArtifactError, SetupError
from audits.naming import visible
from audits.outcomes import Outcome
from audits.report import JSON_SCHEMA, AuditReport
from audits.settings import AuditSettings
from flows.arguments import recipe_folder, refuse_device, refuse_output, refuse_settings
from flows.cli.display import log_line, report_view, stages
from flows.cli.exit_codes import FailOn, exit_code_of
from flows.cli.junit import junit_xml
from flows.output import console, log_console, print_json
from flows.rerunning import rerun_of
from flows.sandbox.private_folders import remove_stale
from flows.sandbox.standby import Standby, standing_by
from flows.settings.environment import GradauditSettings
from registry_models.artifacts.flavours import NOTHING_TO_TRAIN, Outside, OutsideError
from registry_models.recipes.recipe_names import recipe_parts
from registry_models.report.rendering import render_html

#: What publishing imports when it draws its first plot, in 0.4 s.
_FOR_PLOTS = ("matplotlib.figure", "matplotlib.backends.backend_agg")


def audit_target(
    target: str,
    settings: GradauditSettings,
    narrowing: dict[str, Any],
    *,
    recipe: Path | None,
    mark: bool,
    as_json: bool,
    junit: Path | None,
    html: Path | None,
    fail_on: FailOn = FailOn.INCONCLUSIVE,
    exit_zero: bool = False,
) -> int:
    """Audit ``target``, print the result, return the exit code; of what is outside the audit it could not judge.

    A run narrowed to some checks or parameters, or with a recipe of its own, never marks the registry.

    Raises:
        InputError: there is no such version, directory, recipe, device or folder; nothing has been done.
        InfrastructureError: the registry does not answer.
    """
    refuse_output(junit, "--junit")
    refuse_output(html, "--html")
    refuse_settings(settings)
    refuse_device(settings.device)
    if recipe is not None:
        recipe = recipe_folder(recipe)
    remove_stale()
    try:
        shown = _audit(target, settings, narrowing, recipe=recipe, mark=mark)
    except OutsideError as error:
        _print_outside(error, target, as_json=as_json)
        return exit_code_of(Outcome.SKIPPED, before=None, fail_on=fail_on, exit_zero=exit_zero)
    _print(shown.report, shown.rerun, shown.not_published, as_json=as_json)
    if junit is not None:
        junit.write_text(junit_xml(shown.report), encoding="utf-8")
    if html is not None:
        html.write_text(render_html(shown.report, rerun=shown.rerun), encoding="utf-8")
    for line in shown.lines:
        log_line(line)
    return exit_code_of(shown.report.outcome, before=shown.before, fail_on=fail_on, exit_zero=exit_zero)


def _audit(
    target: str, settings: GradauditSettings, narrowing: dict[str, Any], *, recipe: Path | None, mark: bool
) -> _Shown:
    beside = recipe_parts(recipe.resolve()) if recipe is not None else []
    if target.startswith("models:"):
        with standing_by(settings, readable=beside) as standby:
            return _audit_version(target, settings, narrowing, standby, recipe=recipe, mark=mark)
    if Path(target).is_dir():
        with standing_by(settings, readable=[Path(target).resolve(), *beside]) as standby:
            return _audit_directory(target, settings, narrowing, standby, recipe=recipe)
    raise ArtifactError(f"{target!r} is neither models:/NAME/VERSION, models:/NAME@ALIAS nor a model directory")


@dataclasses.dataclass(frozen=True)
class _Shown:
    """What is shown of an audit: the report, the command that repeats it, lines on where it went or why nowhere.

    ``before`` is what the version's audit before this one came to, else that of the version before it.
    """

    report: AuditReport
    rerun: str
    lines: list[str]
    not_published: str = ""
    before: str | None = None


def _audit_directory(
    target: str, settings: GradauditSettings, narrowing: dict[str, Any], standby: Standby, *, recipe: Path | None
) -> _Shown:
    with stages(f"auditing {target}"):
        from flows.one_audit.one_version import audit_directory

        audit_settings = settings.for_model(Path(target).resolve().name, narrowing)
        report = audit_directory(Path(target), settings, audit_settings=audit_settings, recipe=recipe, standby=standby)
    return _Shown(
        report, rerun_of(target), ["nothing was stored or published: a directory is not a registered version"]
    )


def _audit_version(
    target: str,
    settings: GradauditSettings,
    narrowing: dict[str, Any],
    standby: Standby,
    *,
    recipe: Path | None,
    mark: bool,
) -> _Shown:
    # MLflow is imported while the audit's process imports torch.
    from audits.results.committed import CommittedAudits
    from audits.results.store import ResultsStore
    from flows.choosing.night_summary import outcome_before
    from flows.choosing.outside import remember, set_aside
    from flows.cli.result_places import kept_in, new_folder
    from flows.one_audit.one_version import Target, audit_version, fresh_occasion, rerun_command
    from flows.one_audit.storing import NotKeptError
    from registry_models.registry.connecting import connect
    from registry_models.registry.versions import VersionReference, registered

    reference = VersionReference.parse(target)
    with stages(f"looking up {visible(target)}") as tell:
        client = connect(settings.tracking_uri)
        version = registered(reference.resolve(client), client)
        audit_settings = settings.for_model(version.name, narrowing)
        write = mark and not audit_settings.narrowed and recipe is None
        if write:
            if made := new_folder(settings):
                log_line(made)
            ResultsStore(settings.results).prove_writable()
        committed = CommittedAudits(ResultsStore(settings.results)).refresh()
        _, aside = set_aside([version], client, settings.results, committed=committed, keep=write)
        if aside and (recipe is None or aside[0].flavour != NOTHING_TO_TRAIN):
            raise OutsideError(version.label, Outside(aside[0].flavour, aside[0].why))
        before = outcome_before(committed, version)
        rerun = rerun_command(version, settings.tracking_uri)

        def on_stage(stage: str) -> None:
            tell(f"{stage} {version.label}")
            if stage == "auditing" and write:  # while another process works, this one would only wait
                threading.Thread(target=_prepare_plots, daemon=True).start()

        try:
            report = audit_version(
                Target(version, fresh_occasion()),
                client,
                settings,
                audit_settings=audit_settings,
                write=write,
                recipe=recipe,
                on_stage=on_stage,
                standby=standby,
            )
            lines = kept_in(report, settings, client) if write else [_why_not_kept(audit_settings, recipe)]
            return _Shown(report, rerun, lines, before=before)
        except OutsideError as error:
            if write:
                remember(version, error.outside, settings.results)
            raise
        except NotKeptError as error:  # the verdict stands all the same
            cure = "; or use --no-mark, which stores, publishes and marks nothing"
            why = f"{error.why}{cure if isinstance(error.why, SetupError) else ''}"
            return _Shown(error.report, rerun, [], why, before=before)


def _prepare_plots() -> None:
    for name in _FOR_PLOTS:
        importlib.import_module(name)


def _print_outside(error: OutsideError, target: str, *, as_json: bool) -> None:
    """Say that the target is outside the audit: not judged, not marked, and nobody's failure."""
    if as_json:
        told = {"schema": JSON_SCHEMA, "target": target, "outcome": "outside", "flavour": error.outside.flavour}
        print_json(told | {"headline": f"{error}."})
    else:
        console.print(f"OUTSIDE: {error}.", soft_wrap=True, highlight=False, markup=False)
    log_line("nothing was judged, stored, published or marked")


def _why_not_kept(settings: AuditSettings, recipe: Path | None) -> str:
    why = " it looked at a part alone" if settings.narrowed else " of --no-mark" if recipe is None else " of --recipe"
    return f"nothing was stored, published or marked, because{why}"


def _print(report: AuditReport, rerun: str, not_published: str, *, as_json: bool) -> None:
    if as_json:
        told = {"not_published": not_published} if not_published else {}
        print_json(report.to_dict(rerun=rerun) | told, allow_nan=False)
    else:
        console.print(report_view(report))
    if not_published:
        log_console.print(f"not published: {not_published}", style="bold", markup=False, soft_wrap=True)
