"""``gradaudit nightly``: the sweep, now, in this process, under Prefect's embedded server unless one is configured."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any, cast

from audits.errors import InfrastructureError
from audits.naming import label_of_reference, visible
from audits.results.store import ResultsStore
from audits.wording import listed
from flows.arguments import refuse_device, refuse_settings
from flows.choosing.progress import listening
from flows.cli.display import ProgressBar, verdicts_table
from flows.cli.ending import StoppedBySignal
from flows.cli.quiet_prefect import quiet_prefect
from flows.output import console, log_console, print_json
from flows.sandbox.private_folders import remove_stale
from flows.service.embedded_prefect import prefect_server
from flows.settings.environment import GradauditSettings

#: Versions that a line names before it says how many more there are.
NAMED = 8

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State


def run_nightly(settings: GradauditSettings, models: list[str], *, force: bool, as_json: bool) -> int:
    """Run the flow ``nightly-audit``, print its table, return the exit code: 1 when a version failed.

    Raises:
        InfrastructureError: Prefect, MLflow or the results store did not answer.
    """
    result = sweep(settings, models, force=force)
    audited = result["audited"]
    if as_json:
        print_json(result)
    elif not audited and not result["not_audited"]:
        number = result["looked_at"]
        console.print(
            f"Nothing is due: {number} version{'s' if number != 1 else ''} looked at, each with a fresh result."
            if number
            else "Nothing to audit: the registry has no matching version."
        )
    else:
        console.print(verdicts_table(audited, f"{len(audited)} of {result['looked_at']} versions were due"))
        for line in changes(result):
            console.print(line, soft_wrap=True, highlight=False, markup=False)
        console.print(f"Rows: {settings.results}/rows")
    for reference in result["not_audited"]:
        log_console.print(f"not audited, and still due: {label_of_reference(reference)}", markup=False, highlight=False)
    for sentence in result["troubles"]:
        log_console.print(f"why: {visible(sentence)}", soft_wrap=True, markup=False, highlight=False)
    for sentence in result["unready"]:
        log_console.print(f"passed over: {sentence}", soft_wrap=True, markup=False, highlight=False)
    outcomes = {summary["outcome"] for summary in audited}
    if "fail" in outcomes:
        return 1
    return 2 if "inconclusive" in outcomes or result["not_audited"] or not result["looked_at"] else 0


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
