"""``print(report)`` and ``report.passed``: what a person sees who audits in a script."""

from __future__ import annotations

import torch
from torch import nn

from audits import AuditReport, Recipe, audit


def report(*, lost_head: bool) -> AuditReport:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    if lost_head:
        model[2] = nn.Linear(8, 2)
    batch = {"x": torch.randn(6, 4), "y": torch.tensor([0, 1, 0, 1, 0, 1])}
    return audit(model, Recipe.capture(model, batch=batch, loss="cross_entropy", optimizer=optimizer), device="cpu")


def test_a_pass_is_printed_in_a_few_lines() -> None:
    result = report(lost_head=False)
    lines = str(result).splitlines()
    assert result.passed
    assert lines[0].startswith("PASS: ")
    assert "not checked: " in lines[-2]
    assert len(lines) <= 4


def test_a_failure_names_check_parameters_and_reason() -> None:
    result = report(lost_head=True)
    lines = str(result).splitlines()
    assert not result.passed
    assert lines[0] == result.headline
    cause = "an optimizer holds tensors that are not the model's: 2 parameters, from 2.weight"
    assert lines[0].startswith(f"FAIL: {cause} (registration.stale, registration.coverage); ")
    assert lines[1] == f"  fail  {cause} (registration.stale, registration.coverage)", "one cause, one finding"
    assert len(lines) <= 10
    assert max(map(len, lines[1:])) <= 260
