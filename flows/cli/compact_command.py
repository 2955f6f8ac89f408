"""``gradaudit compact``: merge result files now."""

from __future__ import annotations

import datetime

from audits.results.compaction import compact, compact_months, ended_months
from audits.results.store import ResultsStore
from flows.arguments import refuse_absent
from flows.output import console, log_console, print_json
from flows.settings.environment import GradauditSettings


def run_compaction(settings: GradauditSettings, months: list[str], *, as_json: bool) -> int:
    """Merge these months; without any, every past day and every month that has ended. Return 0.

    Raises:
        InputError: a month that is none, or no such store.
        InfrastructureError: the disk refused.
    """
    store = ResultsStore(settings.results)
    today = datetime.datetime.now(datetime.UTC).date()
    with log_console.status("merging result files"):
        chosen = months or ended_months(store, today=today)
        merged = compact_months(store, chosen, before=today)
        if not months:
            merged += compact(store, before=today)
    refuse_absent(store)  # after what is wrong with a month
    left = sum(len(store.files(dataset)) for dataset in ("rows", "audits"))
    if as_json:
        print_json({"merged": merged, "months": chosen, "files": left}, indent=None)
    elif store.local_folder is None:
        console.print(f"{settings.results} is an object store: its files are left as they are.", soft_wrap=True)
    elif merged:
        console.print(f"{merged:,} files merged, {left:,} in the store now.")
    else:
        console.print(f"Nothing to merge before today: {left:,} files in {settings.results}.", soft_wrap=True)
    return 0
