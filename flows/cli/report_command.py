"""``gradaudit report``: a stored audit once more, as ``gradaudit audit`` showed it."""

from __future__ import annotations

from pathlib import Path

from rich.text import Text

from audits.history.reading import compare_with_earlier
from audits.naming import label_of, visible
from audits.results.store import ResultsStore
from flows.arguments import refuse_output
from flows.cli.display import report_view
from flows.cli.exit_codes import EXIT_CODES
from flows.cli.junit import junit_xml
from flows.cli.stored_targets import rerun_of_report, stored_audit
from flows.output import console, print_json
from flows.settings.environment import GradauditSettings
from registry_models.report.changes import changes_of
from registry_models.report.rendering import render_html


def show_report(
    target: str, settings: GradauditSettings, *, as_json: bool, junit: Path | None, html: Path | None
) -> int:
    """Print the newest stored audit of ``target``; return the exit code of its outcome.

    Raises:
        InputError: there is no stored audit of it; the text names what there is.
        InfrastructureError: the store, or the registry for an alias, cannot be read.
    """
    refuse_output(junit, "--junit")
    refuse_output(html, "--html")
    store = ResultsStore(settings.results)
    report = stored_audit(target, store, settings)
    rerun = rerun_of_report(report, settings)
    if as_json:
        print_json(report.to_dict(rerun=rerun), allow_nan=False)
    else:
        identity = report.identity
        at = f"{identity.audited_at:%Y-%m-%d %H:%M} UTC"
        label = label_of(identity.model_name, identity.model_version)
        console.print(Text(f"{label}, audited {at}, audit {visible(identity.audit_id)}", style="dim"))
        console.print(report_view(report))
    if junit is not None:
        junit.write_text(junit_xml(report), encoding="utf-8")
    if html is not None:
        html.write_text(
            render_html(report, rerun=rerun, changes=changes_of(compare_with_earlier(store, report))), encoding="utf-8"
        )
    return EXIT_CODES[report.outcome]
