"""One parameter over time: what every audit of a model said of it, and since when it fails."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from audits.outcomes import SUMMED_UP, Outcome
from audits.results.queries import query
from audits.results.store import ResultsStore


@dataclass(frozen=True, kw_only=True)
class HistoryEntry:
    """One audit's word on one parameter: the worst of the checks that were asked for.

    Attributes:
        audited_at: when.
        audit_id: by which audit.
        version: of which version.
        parameter: the parameter; None for claims about the whole model or phase.
        outcome: the worst outcome; a failed claim of severity warn counts as a warning.
        check: the check that speaks: the worst one, or the first.
        checks: how many rows were judged.
        error: that row's error.
        threshold: what its error was held against.
        detection_limit: the smallest relative error the row would have found.
        message: its sentence.
        run_id: MLflow run with the report.
    """

    audited_at: datetime.datetime
    audit_id: str
    version: int | None
    parameter: str | None
    outcome: Outcome
    check: str
    checks: int
    error: float | None
    threshold: float | None
    detection_limit: float | None
    message: str
    run_id: str | None


@dataclass(frozen=True)
class ParameterHistory:
    """A parameter's history, oldest first.

    Attributes:
        parameter: the parameter; None for claims about the whole model or phase.
        entries: one per audit.
    """

    parameter: str | None
    entries: tuple[HistoryEntry, ...]

    @property
    def failing_since(self) -> HistoryEntry | None:
        """The audit with which the present failure began; None when the newest judgement is no failure.

        An audit that could not judge ends no failure and begins none.
        """
        began = None
        for entry in self.entries:
            if entry.outcome is Outcome.FAIL:
                began = began or entry
            elif entry.outcome.resolved:
                began = None
        return began

    @property
    def before_failing(self) -> HistoryEntry | None:
        """The last audit that judged the parameter right before the present failure."""
        since = self.failing_since
        if since is None:
            return None
        earlier = [m for m in self.entries if m.audited_at < since.audited_at and m.outcome.resolved]
        return earlier[-1] if earlier else None


_RANKS = " ".join(f"WHEN '{outcome}' THEN {rank}" for rank, outcome in enumerate(SUMMED_UP))
_COUNTED = (
    "CASE WHEN r.outcome = 'fail' AND (r.severity = 'warn' OR r.waiver IS NOT NULL) THEN 'warn' ELSE r.outcome END"
)
_SQL = f"""
WITH said AS (
    SELECT r.audit_id, r.audited_at, r.model_version, r.parameter, r."check", r.error, r.threshold, r.detection_limit,
        r.message, r."row", {_COUNTED} AS counted
    FROM (FROM store.rows WHERE model_name = $model) AS r
    SEMI JOIN (FROM store.commits WHERE model_name = $model) AS c  -- as the view `rows`, for one model's commits
    ON c.audit_id = r.audit_id AND r.audited_at >= c.committed_at
        AND CAST(r.audited_at AS DATE) = CAST(c.committed_at AS DATE)
    WHERE {{parameter}} AND {{check}}
), ranked AS (
    SELECT *, count(*) OVER (PARTITION BY audit_id, parameter) AS checks,
        row_number() OVER (PARTITION BY audit_id, parameter ORDER BY CASE counted {_RANKS} END, "row") AS place
    FROM said
)
SELECT ranked.*, a.run_id FROM ranked
LEFT JOIN (SELECT audit_id, run_id FROM audits WHERE model_name = $model) AS a USING (audit_id)
WHERE place = 1
ORDER BY ranked.audited_at, ranked.audit_id, ranked."row"
"""


def history(
    store: ResultsStore,
    model: str,
    *,
    parameter: str | None = None,
    check: str | None = None,
    since: datetime.date | None = None,
) -> list[HistoryEntry]:
    """Return what every audit said of a model's parameters, oldest first.

    Args:
        store: the results store.
        model: the registered model's name.
        parameter: only parameters of this name or glob; all, and what is said of the whole model, without.
        check: only checks of this name or glob.
        since: only audits of this day or later.

    Raises:
        InfrastructureError: the store cannot be read.
    """
    values = {"model": model}
    conditions = {}
    for name, pattern in (("parameter", parameter), ("check", check)):
        conditions[name] = "TRUE"
        if pattern is not None:
            values[name] = pattern
            exact = f'r."{name}" = ${name}'
            conditions[name] = f'({exact} OR r."{name}" GLOB ${name})' if set(pattern) & set("*?[") else exact
    table = query(store, _SQL.format(**conditions), values, since=since)
    return [
        HistoryEntry(
            audited_at=line["audited_at"],
            audit_id=line["audit_id"],
            version=line["model_version"],
            parameter=line["parameter"],
            outcome=Outcome(line["counted"]),
            check=line["check"],
            checks=line["checks"],
            error=line["error"],
            threshold=line["threshold"],
            detection_limit=line["detection_limit"],
            message=line["message"] or "",
            run_id=line["run_id"],
        )
        for line in table.to_pylist()
    ]


def by_parameter(entries: Sequence[HistoryEntry]) -> list[ParameterHistory]:
    """Return one story per parameter, in the order in which the newest audit names them."""
    order = {entry.parameter: index for index, entry in enumerate(entries)}
    chosen = sorted(entries, key=lambda entry: order[entry.parameter])
    grouped = groupby(chosen, key=lambda entry: entry.parameter)
    return [ParameterHistory(name, tuple(sorted(each, key=lambda m: m.audited_at))) for name, each in grouped]
