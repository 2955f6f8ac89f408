"""What an audit of this version could not show, said in its rows, its coverage and its first line."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from audits.causes import Cause
from audits.checks.version import MODEL_WHOLE, RECIPE_DECLARED, RECIPE_TRUSTED
from audits.findings.advice import with_advice
from audits.outcomes import Coverage, Outcome, ResultRow, Severity
from audits.report import AuditReport
from audits.settings import AuditSettings
from registry_models.artifacts.exported import CURE, NOT_VISIBLE
from registry_models.artifacts.loading import LoadedModel
from registry_models.child.assembling import Assembled, Lowered

#: The families of checks that rest on the loss, and those that rest on the optimizer.
_OF_LOSS = ("gradient",)
_OF_OPTIMIZER = ("registration", "update", "step", "optimizer")


def with_limits(report: AuditReport, loaded: LoadedModel, assembled: Assembled, settings: AuditSettings) -> AuditReport:
    """Return the report with what its artifact kind, its assumptions and its recipe's origin leave open.

    Args:
        report: what `audits.audit` returned.
        loaded: the module and what loading it lost.
        assembled: the recipe and where it comes from.
        settings: which checks were asked for.
    """
    rows = list(report.rows)
    coverage = report.coverage_of
    limits = list(report.limits)
    added: list[ResultRow] = []
    assumed = assembled.recipe.assumed
    provenance = {**report.provenance, **assembled.provenance}
    if assembled.recipe.step is None:
        provenance["step"] = "none: the audit takes a canonical step"
    if assumed & {"loss", "optimizer"}:
        rows = [_said(row, _assumption(row.family, assumed, provenance)) for row in rows]
        added.append(_declared(assumed, provenance))
    elif "batch" in assumed:
        told = provenance.get("batch", "assumed")
        text = f"the batch is {told}: this audit says nothing about the data of the real training"
        added.append(ResultRow(check=RECIPE_DECLARED.name, outcome=Outcome.SKIPPED, cause=Cause.ASSUMED, message=text))
    if loaded.exported is not None:
        rows = [_said(row, NOT_VISIBLE) if row.family == "gradient" else row for row in rows]
        notes = "".join(f" {note[0].upper()}{note[1:]}." for note in loaded.exported.notes)
        text = f"{NOT_VISIBLE}, nor are hooks.{notes} For full coverage: {CURE}"
        added.append(_warning(MODEL_WHOLE.name, "exported graph", text))
        limits.append(f"Coverage is reduced ({NOT_VISIBLE}); for full coverage, {CURE}.")
        provenance["artifact"] = f"an exported graph.{notes}"
    if assembled.lowered is not None:
        coverage = _without(coverage, assembled.lowered, rows)
        added.append(_untrusted(assembled.lowered))
        limits.append(f"{assembled.lowered.source} excuses {', '.join(assembled.lowered.fields)}.")
    wanted = with_advice(row for row in added if settings.wants_check(row.check))
    return dataclasses.replace(
        report, rows=(*wanted, *rows), coverage_of=coverage, provenance=provenance, limits=tuple(limits)
    )


def _said(row: ResultRow, text: str) -> ResultRow:
    if not text or row.outcome is Outcome.SKIPPED:
        return row
    return dataclasses.replace(row, message=f"{row.message} [{text}]" if row.message else text)


def _assumption(family: str, assumed: Iterable[str], provenance: dict[str, str]) -> str:
    texts = []
    if "loss" in assumed and family in (*_OF_LOSS, *_OF_OPTIMIZER):
        texts.append(f"loss {provenance.get('loss', 'assumed')}")
    if "optimizer" in assumed and family in _OF_OPTIMIZER:
        texts.append(f"optimizer {provenance.get('optimizer', 'assumed')}")
    return "; ".join(texts)


def _declared(assumed: frozenset[str], provenance: dict[str, str]) -> ResultRow:
    parts = [f"{field} ({provenance.get(field, 'assumed')})" for field in ("loss", "optimizer") if field in assumed]
    left = {"loss": "gradients", "optimizer": "updates"}
    uncovered = " and ".join(left[field] for field in ("loss", "optimizer") if field in assumed)
    return ResultRow(
        check=RECIPE_DECLARED.name,
        outcome=Outcome.INCONCLUSIVE,
        severity=Severity.WARN,
        cause=Cause.ASSUMED,
        message=(
            f"nobody declared the {' and the '.join(parts)}: what was checked holds for these, and {uncovered} count "
            "as not covered. Cure: registry_models.attach_recipe('models:/NAME/VERSION', Recipe.capture(model, "
            "batch=batch, loss=loss, optimizer=optimizer))"
        ),
    )


def _warning(check: str, cause: str, message: str) -> ResultRow:
    return ResultRow(check=check, outcome=Outcome.WARN, severity=Severity.WARN, cause=cause, message=message)


def _untrusted(lowered: Lowered) -> ResultRow:
    return _warning(
        RECIPE_TRUSTED.name,
        "untrusted recipe",
        f"{lowered.source} declares {', '.join(lowered.fields)}. Anybody may set a tag, so the "
        f"{len(lowered.parameters)} parameters this excuses count as not covered. Cure: register the version with this "
        "recipe (log_model(..., recipe=recipe)), or put the fields into the trusted recipes folder",
    )


def _without(coverage: Coverage, lowered: Lowered, rows: list[ResultRow]) -> Coverage:
    """Count the excused parameters as trainable and unresolved, by tensors and by elements."""
    sizes = {row.parameter: row.numel for row in rows if row.parameter is not None and row.numel is not None}
    if not lowered.parameters:
        return coverage
    excused = set(lowered.parameters)
    before = [name for name in coverage.unresolved if name not in excused]
    known = {n for n, size in sizes.items() if size and not n.startswith("<")} | excused | set(before)
    unresolved = (*before, *lowered.parameters)
    elements = sum(sizes.get(name) or 0 for name in known) or 1
    left = sum(sizes.get(name) or 0 for name in unresolved)
    return Coverage(
        tensors=min(coverage.tensors, 1 - len(unresolved) / len(known)),
        elements=max(0.0, min(coverage.elements, 1 - left / elements)),
        unresolved=unresolved,
    )
