"""What the results store says of the demo's versions, against what was planted in them."""

from __future__ import annotations

from collections.abc import Sequence

from audits.results.committed import CommittedAudits
from audits.results.store import ResultsStore
from flows.choosing.audit_summary import AuditSummary, summaries_of
from flows.demo.catalogue import DemoVersion


def committed_verdicts(results: str, versions: Sequence[DemoVersion]) -> list[AuditSummary]:
    """Return the newest committed verdict of every demo version that has one, in the demo's order."""
    committed = CommittedAudits(ResultsStore(results)).refresh()
    found = (committed.of(wanted.name, wanted.version)[-1:] for wanted in versions)
    return summaries_of([audit for newest in found for audit in newest], results)


def surprises(verdicts: Sequence[AuditSummary], versions: Sequence[DemoVersion]) -> list[str]:
    """Return one sentence per version whose verdict is not the one that was planted."""
    outcomes = {(verdict["model"], verdict["version"]): verdict["outcome"] for verdict in verdicts}
    texts = []
    for wanted in versions:
        outcome = outcomes.get((wanted.name, wanted.version))
        expected = ("fail",) if wanted.planted else ("pass", "warn")
        if outcome not in expected:
            texts.append(
                f"{wanted.name} v{wanted.version}: {outcome or 'not audited'}, expected {' or '.join(expected)}"
            )
    return texts
