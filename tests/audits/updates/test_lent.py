"""Gradients and state judged without a copy: what is lent and then written to is recorded again, with copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from audits.outcomes import Outcome, ResultRow
from audits.updates.record.lent import Lending, _marks
from audits.updates.record.recorder import Recorder
from tests.audits.updates.subjects import audited, failed
from tests.wrong_on_purpose.updates import models


def _plain(model: Any, batch: Any, context: Any) -> None:
    context.optimizer.zero_grad()
    models.classify(model, batch).backward()
    context.optimizer.step()


def _scrubs_gradients(model: Any, batch: Any, context: Any) -> None:
    _plain(model, batch, context)
    for parameter in model.parameters():
        parameter.grad.zero_()


def _scrubs_data(model: Any, batch: Any, context: Any) -> None:
    _plain(model, batch, context)
    for parameter in model.parameters():
        parameter.grad.data.zero_()  # torch counts no write


def _scrubs_state(model: Any, batch: Any, context: Any) -> None:
    _plain(model, batch, context)
    optimizer = context.optimizer
    for state in optimizer.state.values():
        state["exp_avg"].mul_(1.0)


def _doubles_gradients(model: Any, batch: Any, context: Any) -> None:
    context.optimizer.zero_grad()
    models.classify(model, batch).backward()
    for parameter in model.parameters():
        parameter.grad.mul_(2)
    context.optimizer.step()


def _adds_up(model: Any, batch: Any, context: Any) -> None:
    models.classify(model, batch).backward()  # never put to zero
    context.optimizer.step()


def _rows(step: Callable[..., None] | None, dtype: torch.dtype) -> list[ResultRow]:
    model, batch = models.mlp()
    model = model.to(dtype)
    batch = {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in batch.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return audited(model, batch=batch, loss=models.classify, optimizer=optimizer, step=step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "step", [None, _plain, _scrubs_gradients, _scrubs_data, _scrubs_state, _doubles_gradients, _adds_up]
)
def test_rows_are_those_of_copies(
    step: Callable[..., None] | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    lent: list[str] = []
    spoilt: list[bool] = []
    lend, end = Lending.lend_gradient, Recorder.end

    def counted(self: Lending, call: Any, name: str, gradient: torch.Tensor) -> None:
        lent.append(name)
        lend(self, call, name, gradient)

    def ended(self: Recorder) -> None:
        end(self)
        spoilt.append(self.lending.spoilt)

    monkeypatch.setattr(Lending, "lend_gradient", counted)
    monkeypatch.setattr(Recorder, "end", ended)
    found = _rows(step, dtype)
    assert lent
    assert any(spoilt) == (step in (_scrubs_gradients, _scrubs_data, _scrubs_state))
    monkeypatch.setattr(Lending, "state", lambda *_: False)
    lent.clear()
    assert found == _rows(step, dtype)
    assert not lent


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_wrong_is_found_with_what_is_lent(dtype: torch.dtype) -> None:
    checks = {check for check, _ in failed(_rows(_doubles_gradients, dtype))}
    assert any(check.startswith("step.") for check in checks), checks
    assert failed(_rows(_plain, dtype)) == []
    assert Outcome.FAIL not in {r.outcome for r in _rows(_scrubs_gradients, dtype)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.complex64])
@pytest.mark.parametrize("start", [0, 1, 3])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 33])
def test_the_mark_of_a_tensor_shows_each_of_its_elements(count: int, start: int, dtype: torch.dtype) -> None:
    base = torch.randint(1, 90, (start + count,)).to(dtype)
    tensor = base[start:]
    [(_, before)] = _marks([tensor])
    assert _marks([tensor.clone()])[0][1] == before or start, "words begin where the tensor does"
    for index in range(count):
        kept = base[start + index].clone()
        base.data[start + index] = 1 if kept != 1 else 2
        [(_, now)] = _marks([tensor])
        assert (now == before) is bool(kept == base[start + index])
        base.data[start + index] = kept
    assert _marks([tensor])[0][1] == before
