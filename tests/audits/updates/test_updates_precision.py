"""The update audit where float32 products may run in TF32: no false alarm, and what TF32 cannot explain is found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from audits.lanes.precision import Product, products_in
from audits.outcomes import Outcome
from tests.audits.tf32 import Tf32, allowed
from tests.audits.updates.subjects import audited, failed, of


def _cnn() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 25, 3))
    return model, {"x": torch.randn(8, 2, 7, 7), "y": torch.randint(0, 3, (8,))}


def _loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"])


def _other_algorithm(model: nn.Module, batch: Any, context: Any) -> None:
    """A step whose convolutions took another algorithm than the audit's reference: one that rounds to TF32."""
    optimizer = context.optimizers["step"]
    optimizer.zero_grad()
    with Tf32(cut=True):
        _loss(model, batch).backward()
    optimizer.step()


def _scaled(model: nn.Module, batch: Any, context: Any) -> None:
    """The same, and a gradient that is 2 % too long."""
    optimizer = context.optimizers["step"]
    optimizer.zero_grad()
    with Tf32(cut=True):
        (1.02 * _loss(model, batch)).backward()
    optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize(("step", "right"), [(_other_algorithm, True), (_scaled, False)])
def test_step_gradient_takes_its_eps_from_the_products(step: Any, right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = _cnn()
    options = {"batch": batch, "loss": _loss, "step": step}
    before = audited(model, optimizer=torch.optim.SGD(model.parameters(), lr=1e-2), **options)
    assert any(check == "step.gradient" for check, _ in failed(before))  # as float32, either is off
    allowed(monkeypatch, Product.CONVOLUTION, Product.MATMUL)
    rows = audited(model, optimizer=torch.optim.SGD(model.parameters(), lr=1e-2), **options)
    wrong = {parameter for check, parameter in failed(rows) if check == "step.gradient"}
    assert bool(wrong) is not right
    for r in of(rows, "step.gradient"):
        assert r.dtype == "torch.float32 (tf32)"
    if right:
        assert failed(rows) == []
    else:
        assert "0.weight" in wrong
        assert any("scale is off by a factor 1.0" in r.message for r in rows if r.outcome is Outcome.FAIL)


def test_which_products_a_model_has() -> None:
    model, _ = _cnn()
    assert products_in(nn.Linear(2, 2)) == {Product.MATMUL}
    assert products_in(model) == {Product.MATMUL, Product.CONVOLUTION}
    assert products_in(nn.LSTM(2, 2)) == {Product.MATMUL, Product.RECURRENT}


class _Cut(torch.optim.Adafactor):
    """Adafactor whose outer product runs on a tensor core."""

    def step(self, closure: Any = None) -> Any:
        with Tf32(cut=True):
            return super().step(closure)


class _Stretched(torch.optim.Adafactor):
    """The same with steps that are 1 % too long."""

    def step(self, closure: Any = None) -> Any:
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        before = [p.detach().clone() for p in held]
        with Tf32(cut=True):
            super().step(closure)
        with torch.no_grad():
            for p, old in zip(held, before, strict=True):
                p.add_(p - old, alpha=0.01)


@pytest.mark.parametrize(("kind", "right"), [(_Cut, True), (_Stretched, False)])
def test_adafactors_outer_product(kind: Any, right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = _cnn()
    expect = {"optimizer": "torch.optim.Adafactor"}

    def rows() -> Any:
        optimizer = kind(model.parameters(), lr=1e-2, foreach=False)
        return audited(model, batch=batch, loss=_loss, optimizer=optimizer, expect=expect)

    assert any(check == "optimizer.probe" for check, _ in failed(rows()))  # as float32
    allowed(monkeypatch, Product.MATMUL)
    found = failed(rows())
    assert (found == []) is right
    if not right:
        assert any(check in ("update.rule", "optimizer.probe") for check, _ in found)
