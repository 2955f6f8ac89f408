"""Large tensors judged slice by slice: the rows of tensors judged whole."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from audits.outcomes import Outcome, ResultRow
from audits.updates.judge import sliced_look, slices
from tests.audits.updates.subjects import audited, failed, of
from tests.wrong_on_purpose.updates import models

_BUILDS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=0.1),
    "AdamW tiny rate": lambda p: torch.optim.AdamW(p, lr=1e-9, weight_decay=0.1),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=0.1, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-4, foreach=True),
    "NAdam": lambda p: torch.optim.NAdam(p),
    "RAdam": lambda p: torch.optim.RAdam(p),
    "Adamax": lambda p: torch.optim.Adamax(p),
    "Adagrad": lambda p: torch.optim.Adagrad(p, weight_decay=0.01),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "RMSprop": lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.9),
    "Rprop": lambda p: torch.optim.Rprop(p),
    "ASGD": lambda p: torch.optim.ASGD(p),
    "Adafactor": lambda p: torch.optim.Adafactor(p),
    "Muon": lambda p: torch.optim.Muon([q for q in p if q.dim() == 2]),
}


def _rows(name: str, dtype: torch.dtype, *, steps_before: int = 0) -> list[ResultRow]:
    model, batch = models.gpt()
    model = model.to(dtype)
    optimizer = _BUILDS[name](list(model.parameters()))
    for _ in range(steps_before):
        optimizer.zero_grad()
        models.next_token(model, batch).backward()
        optimizer.step()
    return audited(model, batch=batch, loss=models.next_token, optimizer=optimizer)


def _same(one: ResultRow, other: ResultRow) -> None:
    """Equal in all but the rounding of sums: 1e-9 of a number, or of what is no more than rounding of a float64 sum."""
    for of_field in dataclasses.fields(ResultRow):
        a, b = getattr(one, of_field.name), getattr(other, of_field.name)
        if isinstance(a, float) and isinstance(b, float):
            assert math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12), (of_field.name, a, b, one.message)
        else:
            assert a == b, (of_field.name, a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", _BUILDS)
def test_rows_are_those_of_whole_tensors(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _rows(name, dtype, steps_before=2)
    sliced: list[str] = []
    at = sliced_look.SlicedLook.at

    def counted(self: Any, parameter: str) -> Any:
        found = at(self, parameter)
        sliced.extend([parameter] if found is not None else [])
        return found

    monkeypatch.setattr(sliced_look.SlicedLook, "at", counted)
    monkeypatch.setattr(slices, "SLICE", 37)
    parts = _rows(name, dtype, steps_before=2)
    assert len(parts) == len(whole)
    for one, other in zip(parts, whole, strict=True):
        _same(one, other)
    if name in ("SGD", "Adam", "AdamW", "Adagrad", "RMSprop"):
        assert sliced


class _SkipsTheTail(torch.optim.AdamW):
    """Leaves the last element of every tensor where it was."""

    def step(self, closure: Any = None) -> Any:
        kept = [(p, p.detach().reshape(-1)[-1].clone()) for group in self.param_groups for p in group["params"]]
        result = super().step(closure)
        with torch.no_grad():
            for parameter, value in kept:
                parameter.view(-1)[-1] = value
        return result


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_what_departs_is_judged_whole_and_explained(momentum: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.13's fused SGD skips blocks of low-precision weights on the CPU (pytorch#191763)."""

    def rows() -> list[ResultRow]:
        model, batch = models.gpt()
        optimizer = torch.optim.SGD(model.bfloat16().parameters(), lr=0.1, momentum=momentum, fused=True)
        return audited(model, batch=batch, loss=models.next_token, optimizer=optimizer)

    whole = rows()
    assert [r for r in whole if r.check == "update.rule" and r.outcome is Outcome.FAIL]
    monkeypatch.setattr(slices, "SLICE", 37)
    for one, other in zip(rows(), whole, strict=True):
        if momentum and "momentum_buffer" in (one.message or ""):  # the kernel leaves memory as it found it there
            one, other = (dataclasses.replace(r, error=None, message="") for r in (one, other))
        _same(one, other)


def test_a_skipped_element_is_found_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "SLICE", 37)
    model, batch = models.mlp()
    rows = audited(model, batch=batch, loss=models.classify, optimizer=_SkipsTheTail(model.parameters(), lr=1e-2))
    assert ("update.rule", "head.weight") in {(r.check, r.parameter) for r in rows if r.outcome is Outcome.FAIL}
    model, batch = models.mlp()
    rows = audited(model, batch=batch, loss=models.classify, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2))
    assert failed(rows) == []
    assert {r.outcome for r in of(rows, "update.rule")} == {Outcome.PASS}
