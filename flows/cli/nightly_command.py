"""``gradaudit nightly``: the sweep, now, in this process, under Prefect's embedded server unless one is configured."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from typing import TYPE_CHECKING, Any, cast

from audits.errors import InfrastructureError
from audits.naming import label_of, label_of_reference, reference_to, visible
from audits.results.store import ResultsStore
from audits.wording import listed, plural
from flows.arguments import refuse_device, refuse_settings
from flows.choosing.progress import listening
from flows.cli.display import ProgressBar, verdicts_table
from flows.cli.ending import StoppedBySignal
from flows.cli.exit_codes import NOT_JUDGED, FailOn, exit_code, unexcused
from flows.cli.quiet_prefect import quiet_prefect
from flows.output import console, log_console, print_json
from flows.sandbox.private_folders import remove_stale
from flows.service.embedded_prefect import prefect_server
from flows.settings.environment import GradauditSettings

#: Versions that a line names before it says how many more there are.
NAMED = 8

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State


def run_nightly(
    settings: GradauditSettings,
    models: list[str],
    *,
    force: bool,
    as_json: bool,
    every: bool = False,
    fail_on: FailOn = FailOn.INCONCLUSIVE,
    exit_zero: bool = False,
) -> int:
    """Run the flow ``nightly-audit``, print its table, return the exit code.

    1 when a version failed; 2 when one could not be judged, and nobody excused it; versions outside the audit count for
    nothing. What a service kept from being audited is 2 whatever was asked for.

    Raises:
        InfrastructureError: Prefect, MLflow or the results store did not answer.
    """
    result = sweep(settings, models, force=force)
    if as_json:
        print_json(result)
    else:
        _print_night(result, settings, every=every)
    for reference in result["not_audited"]:
        log_console.print(f"not audited, and still due: {label_of_reference(reference)}", markup=False, highlight=False)
    for sentence in result["troubles"]:
        log_console.print(f"why: {visible(sentence)}", soft_wrap=True, markup=False, highlight=False)
    for sentence in result["unready"]:
        log_console.print(f"passed over: {sentence}", soft_wrap=True, markup=False, highlight=False)
    outcomes = [summary["outcome"] for summary in result["audited"]]
    unjudged = [reference_to(s["model"], s["version"]) for s in result["audited"] if s["outcome"] == "inconclusive"]
    code = exit_code(
        failed="fail" in outcomes,
        newly_failed=bool(result["newly_failed"]),
        unjudged=bool(unexcused(unjudged, result["excused"])) or not result["looked_at"],
        fail_on=fail_on,
        exit_zero=exit_zero,
    )
    return code or (NOT_JUDGED if result["not_audited"] else 0)


def _print_night(result: dict[str, Any], settings: GradauditSettings, *, every: bool) -> None:
    audited, number = result["audited"], result["looked_at"]
    known = set() if every else set(result["without_recipe"]["versions"]) & set(result["excused"])
    news = [summary for summary in audited if reference_to(summary["model"], summary["version"]) not in known]
    if news or result["not_audited"]:
        console.print(verdicts_table(news, f"{len(audited)} of {number} versions were due", every=every))
    elif number:
        rest = " or outside the audit" if result["outside"] else ""
        told = f"Nothing is due: {plural(number, 'version')} looked at, each with a fresh result{rest}."
        console.print(told, soft_wrap=True)
    else:
        console.print("Nothing to audit: the registry has no matching version.")
    for line in [*changes(result), *counted(result, every=every)]:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    if audited:
        console.print(f"Rows: {settings.results}/rows")


def counted(result: dict[str, Any], *, every: bool) -> list[str]:
    """Return what is no news but counted: versions without a recipe, and those outside the audit, named when new."""
    lines = []
    missing, outside = result["without_recipe"], result["outside"]
    if missing["versions"]:
        lines.append(f"{plural(len(missing['versions']), 'version')} without a recipe, known since {missing['since']}")
    if outside:
        flavours = Counter(one["flavour"] for one in outside)
        each = ", ".join(f"{count} {flavour}" for flavour, count in flavours.most_common())
        lines.append(f"{plural(len(outside), 'version')} outside the audit ({each})")
        told = [one for one in outside if every or one["new"]]
        for flavour, why in dict.fromkeys((one["flavour"], one["why"]) for one in told):
            names = [label_of(one["model"], one["version"]) for one in told if one["why"] == why]
            lines.append(f"  {flavour}: {listed(names, len(names) if every else NAMED)} ({why})")
    return lines


class SweepStoppedError(InfrastructureError):
    """A sweep ended before its last version.

    Attributes:
        done: versions that it had audited and marked by then.
    """

    def __init__(self, why: str, done: int) -> None:
        super().__init__(f"the sweep stopped: {why}")
        self.done = done


def changes(result: dict[str, Any]) -> list[str]:
    """Return what the night changed, in sentences: what failed newly, what was fixed, what only had its turn."""
    lines = []
    for title, mark in (("newly_failed", "Failed newly"), ("fixed", "Fixed")):
        names = [label_of_reference(reference) for reference in result[title]]
        if names:
            lines.append(f"{mark}: {listed(names, NAMED)}")
    again = result["again"]
    if again:
        whose = "1 unchanged version was" if again == 1 else f"{again} unchanged versions were"
        lines.append(f"{whose} audited again in turn.")
    return lines


def sweep(settings: GradauditSettings, models: list[str], *, force: bool) -> dict[str, Any]:
    """Run the flow with these settings and a progress bar; return its result.

    Raises:
        InputError: the tracking URI, a setting or a model's name leads nowhere.
        InfrastructureError: the sweep could not be done at all; ``not_audited`` names single versions otherwise.
    """
    from registry_models.registry.connecting import connect
    from registry_models.registry.versions import refuse_models

    refuse_settings(settings)
    refuse_device(settings.device)
    remove_stale()
    with log_console.status("looking at the registry"):
        refuse_models(models, connect(settings.tracking_uri))  # refused now rather than after Prefect's start
        ResultsStore(settings.results).prove_writable()
    os.environ["GRADAUDIT_TRACKING_URI"] = settings.tracking_uri
    os.environ["GRADAUDIT_RESULTS"] = settings.results
    with contextlib.ExitStack() as stack:
        with log_console.status("starting Prefect"):
            stack.enter_context(prefect_server())
            from flows.nightly import nightly_audit
        stack.enter_context(quiet_prefect())
        bar = stack.enter_context(ProgressBar())
        stack.enter_context(listening(bar))
        try:
            state = cast("State[Any]", nightly_audit(models, force, return_state=True))
        except StoppedBySignal as stopped:
            left = bar.total - bar.done
            told = f"{bar.done} done, {left} left: the next run takes them" if bar.total else ""
            raise StoppedBySignal(stopped.number, told) from None
    if state.is_completed():
        found: dict[str, Any] = state.result()
        return found
    if bar.result is not None:
        return bar.result  # some could not be audited; the others have their results
    error = state.result(raise_on_failure=False)
    if isinstance(error, Exception):
        raise SweepStoppedError(str(error), bar.done) from error
    raise SweepStoppedError(str(state.message), bar.done)
