"""Audits as the results store has them: found by model, version or id, and read back as reports.

Only committed audits count: those with a line in ``audits``.
"""

from __future__ import annotations

import datetime
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds

from audits.errors import InputError, suggest
from audits.history.comparison import Comparison, compare
from audits.naming import label_of, reference_to, shell_words
from audits.outcomes import Coverage, Lane, Outcome, ResultRow, Severity
from audits.report import AuditReport
from audits.results.files import Layer, StoreFile, while_files_move
from audits.results.format import IDENTITY_FIELDS, ROW_FIELDS
from audits.results.identity import AuditIdentity
from audits.results.store import ResultsStore
from audits.wording import listed


@dataclass(frozen=True)
class EarlierComparisons:
    """What changed since earlier audits; each is None where there is no earlier one.

    Attributes:
        audit: against the previous audit of the same version: what a notification is about.
        version: against the newest audit of the last audited version before this one.
    """

    audit: Comparison | None
    version: Comparison | None


def compare_with_earlier(store: ResultsStore, report: AuditReport) -> EarlierComparisons:
    """Hold an audit against the previous one of its version, and against the last audited version before it.

    The audit itself need not be stored yet; an earlier writing of the same audit is passed over.

    Args:
        store: where the earlier audits are.
        report: an audit of a registered version.

    Raises:
        InfrastructureError: the store cannot be read.
    """
    identity = report.identity
    version = identity.model_version
    if version is None:
        return EarlierComparisons(None, None)
    earlier = [
        line
        for line in committed_audits(store, identity.model_name)
        if line["audit_id"] != identity.audit_id and line["audited_at"] <= identity.audited_at
    ]
    same = next((line for line in earlier if line["model_version"] == version), None)
    below = [line for line in earlier if (line["model_version"] or 0) < version and _judged(line)]
    last = max(below, key=lambda line: (line["model_version"], line["audited_at"]), default=None)
    audit, before = (None if line is None else compare(stored_report(store, line), report) for line in (same, last))
    return EarlierComparisons(audit, before)


def committed_audits(store: ResultsStore, model: str) -> list[dict[str, Any]]:
    """Return the lines of ``audits`` of one model, newest first.

    Cheap enough to be asked after every audit: merged files are pruned by their statistics, and of files that hold one
    audit it is remembered whose they are.

    Raises:
        InfrastructureError: the store cannot be read.
    """

    def read() -> list[dict[str, Any]]:
        files = _those_of(model, store, store.files("audits"))
        found: list[dict[str, Any]] = store.read(
            "audits", filter=ds.field("model_name") == model, files=files
        ).to_pylist()
        return found

    lines = while_files_move(read)
    return sorted(lines, key=lambda line: line["audited_at"], reverse=True)


def newest_audit(store: ResultsStore, model: str, version: int) -> dict[str, Any]:
    """Return the newest audit's line of a version.

    Raises:
        InputError: there is none; the text names what there is.
        InfrastructureError: the store cannot be read.
    """
    lines = committed_audits(store, model)
    found = next((line for line in lines if line["model_version"] == version), None)
    if found is not None:
        return found
    if lines:
        audited = ", ".join(f"v{v}" for v in sorted({line["model_version"] for line in lines}))
        raise InputError(
            f"{label_of(model, version)} has no audit in {store.root}; of this model it has {audited}. "
            f"`{shell_words(['gradaudit', 'audit', reference_to(model, version)])}` makes one"
        )
    raise unknown_model(store, model)


def unknown_model(store: ResultsStore, model: str) -> InputError:
    """Return the error for a model of which the store has nothing: the nearest names it has, or that it is empty."""
    known = set(store.read("audits", columns=["model_name"]).column("model_name").to_pylist())
    if not known:
        return InputError(
            f"there is no audit in {store.root} yet: `gradaudit audit` or `gradaudit nightly` makes one, --results "
            "names another store"
        )
    hint = suggest(model, known)
    return InputError(f"no audit of {model!r} in {store.root}{hint or '; it has ' + listed(sorted(known), 5)}")


def find_audit(store: ResultsStore, audit_id: str) -> dict[str, Any]:
    """Return the line of the audit with this id; the beginning of one is enough where only one has it.

    Raises:
        InputError: there is none, or several begin like this.
        InfrastructureError: the store cannot be read.
    """
    lines = store.read("audits", columns=["audit_id", "model_name"]).to_pylist()
    found = [line for line in lines if line["audit_id"].startswith(audit_id)]
    exact = [line for line in found if line["audit_id"] == audit_id]
    found = exact or found
    if not found or not audit_id:
        raise InputError(f"{store.root} has no audit whose id begins with {audit_id!r}")
    if len(found) > 1:
        raise InputError(f"{len(found)} audits begin with {audit_id!r}: write more of the id")
    committed = committed_audits(store, found[0]["model_name"])
    return next(line for line in committed if line["audit_id"] == found[0]["audit_id"])


def stored_report(store: ResultsStore, line: Mapping[str, Any]) -> AuditReport:
    """Return the report of a committed audit, as it was when it was made.

    Args:
        store: the store.
        line: its line in ``audits``.

    Raises:
        InfrastructureError: the rows cannot be read.
    """
    day: datetime.date = line["audited_at"].astimezone(datetime.UTC).date()
    mine = (ds.field("model_name") == line["model_name"]) & (ds.field("audit_id") == line["audit_id"])

    def read() -> pa.Table:
        files = [f for f in store.files("rows", since=day, until=day) if f.audit_id in (None, line["audit_id"])]
        own = [file for file in files if file.layer is Layer.AUDIT]
        return store.read("rows", filter=mine, files=own or files).sort_by("row")

    table = while_files_move(read)
    return AuditReport(
        rows=tuple(rows_of(table)),
        coverage_of=Coverage(line["coverage"], line["coverage_elements"], tuple(line["unresolved"] or ())),
        identity=AuditIdentity(**{field.name: line[field.name] for field in IDENTITY_FIELDS}),
        seconds=line["seconds"] or 0.0,
        provenance=dict(line["provenance"] or ()),
        run_id=line["run_id"],
        limits=tuple(line["limits"] or ()),
        parts=dict(line["parts"] or ()),
        waivers=tuple(line["waivers"] or ()),
    )


def rows_of(table: pa.Table) -> Iterable[ResultRow]:
    """Yield the rows of a table that has the row columns."""
    names = [field.name for field in ROW_FIELDS if field.name != "row"]
    for values in table.select(names).to_pylist():
        lane = values["lane"]
        yield ResultRow(
            **{
                **values,
                "outcome": Outcome(values["outcome"]),
                "severity": Severity(values["severity"]),
                "lane": None if lane is None else Lane(lane),
                "message": values["message"] or "",
            }
        )


def _judged(line: Mapping[str, Any]) -> bool:
    """Whether the audit got as far as a claim; one that was refused says nothing to be held against."""
    return bool(line["n_pass"] or line["n_fail"] or line["n_warn"])


#: (store, path) -> the model of a file with one audit. Its name is a digest of the model's too, so that never changes.
_models: OrderedDict[tuple[str, str], str] = OrderedDict()
_REMEMBERED = 100_000


def _those_of(model: str, store: ResultsStore, files: Sequence[StoreFile]) -> list[StoreFile]:
    """The merged files, and of those that hold one audit the model's."""
    single = {file: (store.root, file.path) for file in files if file.audit_id is not None}
    unknown = {file.audit_id: key for file, key in single.items() if key not in _models}
    if unknown:
        paths = [path for _, path in unknown.values()]
        for line in store.dataset("audits", paths).to_table(columns=["audit_id", "model_name"]).to_pylist():
            if line["audit_id"] in unknown:
                _models[unknown[line["audit_id"]]] = line["model_name"]
        while len(_models) > _REMEMBERED:
            _models.popitem(last=False)
    merged = [file for file in files if file.audit_id is None]
    return merged + [file for file, key in single.items() if _models.get(key, model) == model]
