"""What is tried when an audit needs more memory than there is: the CPU, then a smaller probe; the report says so."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from audits.causes import Cause
from audits.outcomes import Outcome, ResultRow
from audits.report import AuditReport
from audits.settings import AuditSettings
from flows.one_audit.gpu import chosen_gpu
from flows.one_audit.memory_need import needed
from registry_models.artifacts.snapshot import Snapshot

#: Causes of rows that say that memory ran out.
OUT_OF_MEMORY = frozenset({Cause.OUT_OF_MEMORY, Cause.MEMORY_LIMIT})

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """One way of auditing a snapshot, which needs less memory than the one before it.

    Attributes:
        device: the child's.
        settings: the child's.
        name: for the report.
    """

    device: str
    settings: AuditSettings
    name: str


def memory_plans(snapshot: Snapshot, device: str, settings: AuditSettings) -> Iterator[tuple[MemoryPlan, str]]:
    """Yield the plans to audit a snapshot, best first, each with the reason why the one before was not taken."""
    gpu = chosen_gpu(device)
    reason = ""
    if gpu is not None:
        need, there = needed(snapshot), gpu.memory_bytes
        if there is None or need.total <= there:
            yield MemoryPlan(device, settings, f"the GPU ({device})"), ""
            reason = f"memory ran out on the GPU ({device})"
        else:
            reason = f"it needs at least {need.total / _GIB:.1f} GiB, the GPU has {there / _GIB:.1f} GiB ({need.text})"
    yield MemoryPlan("cpu" if gpu is not None else device, settings, "the CPU"), reason
    smaller = dataclasses.replace(settings, method="probe", input_gradient_limit=0)
    if smaller != settings:
        yield (
            MemoryPlan("cpu" if gpu is not None else device, smaller, "the CPU with a smaller probe"),
            "memory ran out on the CPU",
        )


def out_of_memory(report: AuditReport) -> bool:
    """Whether the audit, or a part of it, ended for want of memory."""
    return any(row.cause in OUT_OF_MEMORY for row in report.rows)


def with_fallback_note(report: AuditReport, plan: MemoryPlan, reasons: list[str]) -> AuditReport:
    """Return the report with what was not possible and what was done instead."""
    if not reasons:
        return report
    text = f"audited on {plan.name}: {', then '.join(reasons)}"
    row = ResultRow(check="audit.completed", outcome=Outcome.SKIPPED, cause=Cause.LESS_MEMORY, message=text)
    return dataclasses.replace(
        report, rows=(row, *report.rows), limits=(*report.limits, f"{text[0].upper()}{text[1:]}.")
    )
