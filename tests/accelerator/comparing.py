"""An audit on the emulated device beside the same audit on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import audits
from audits.outcomes import Outcome, ResultRow
from audits.report import AuditReport
from tests.accelerator import NAME

#: ``() -> (model, arguments of Recipe.capture)``; the same every time.
Build = Callable[[], tuple[nn.Module, dict[str, Any]]]


def said(report: AuditReport) -> set[tuple[str, str | None, str, str]]:
    """Return (check, parameter, phase, outcome) of every row that fails or could not be judged.

    Warnings are left out: those about rounding differ where a gradient is nothing but rounding.
    """
    return {key(r) for r in report.rows if r.outcome in (Outcome.FAIL, Outcome.INCONCLUSIVE)}


def key(r: ResultRow) -> tuple[str, str | None, str, str]:
    """Return (check, parameter, phase, outcome)."""
    return r.check, r.parameter, r.phase or "", r.outcome.value


def failing(report: AuditReport) -> list[str]:
    """Return the messages of what failed, and of what could not be judged at all."""
    return [r.message for r in report.rows if r.outcome is Outcome.FAIL or r.check == "audit.completed"]


def both(build: Build) -> AuditReport:
    """Audit on the CPU and on the device, see that they say the same, and return the device's report."""
    reports = []
    for device in ("cpu", NAME):
        torch.manual_seed(1)
        model, arguments = build()
        reports.append(audits.audit(model, audits.Recipe.capture(model, **arguments), device=device))
    cpu, there = reports
    assert there.identity.device == NAME
    apart = said(there) ^ said(cpu)
    assert not apart, (apart, [r.message for report in reports for r in report.rows if key(r) in apart])
    assert there.coverage == cpu.coverage
    return there
