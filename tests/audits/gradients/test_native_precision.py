"""The native-dtype oracle where float32 products run in TF32: healthy nets pass, what TF32 cannot explain is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from audits.lanes.precision import Product
from audits.outcomes import Lane, Outcome, ResultRow
from tests.audits.gradients.cases import FINITE, NATIVE, Activation, Swish, audit, classes, net
from tests.audits.gradients.test_native import SingleOnly, off_by
from tests.audits.tf32 import Tf32, allowed, switches_kept, to_tf32


class Last(nn.Module):
    """An LSTM's or attention's last output."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.inner(x, x, x) if isinstance(self.inner, nn.MultiheadAttention) else self.inner(x)
        return out[0][:, -1]


NETS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)), (6, 4, 12)),
    "conv2d": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4),
                              nn.Flatten(), nn.LazyLinear(3)),
        (4, 3, 9, 9),
    ),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 4, 3), nn.GELU(), nn.Flatten(), nn.LazyLinear(3)), (3, 2, 5, 5, 5)),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)),
        (4, 3, 5, 5),
    ),
    "positive": (  # nothing cancels: digits that are cut off add up
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
                              nn.LazyLinear(3)),
        (4, 3, 9, 9),
    ),
    "lstm": (lambda: nn.Sequential(Last(nn.LSTM(5, 16, 2, batch_first=True)), nn.Linear(16, 3)), (4, 40, 5)),
    "gru": (lambda: nn.Sequential(Last(nn.GRU(5, 16, batch_first=True)), nn.Linear(16, 3)), (4, 40, 5)),
    "attention": (
        lambda: nn.Sequential(Last(nn.MultiheadAttention(16, 4, batch_first=True)), nn.Linear(16, 3)), (4, 9, 16),
    ),
}  # fmt: skip


def _case(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(3)
    build, shape = NETS[name]
    model = build()
    x = torch.randn(shape)
    model(x)
    if name == "positive":
        for parameter in model.parameters():
            parameter.data.abs_()
        x = x.abs()
    return model, {"x": x, "y": torch.randint(0, 3, (shape[0],))}


def _judged(rows: list[ResultRow]) -> list[ResultRow]:
    return [row for row in rows if row.outcome is not Outcome.SKIPPED]


@pytest.mark.parametrize("cut", [False, True], ids=["rounded", "cut"])
@pytest.mark.parametrize("name", NETS)
def test_healthy_nets_pass_in_tf32(name: str, cut: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = _case(name)
    with Tf32(cut=cut) as mode:
        before = audit(model, batch, checks=(NATIVE,))
        allowed(monkeypatch, *Product)
        rows = audit(model, batch, checks=(NATIVE,))
    assert mode.seen
    assert any(row.outcome is Outcome.FAIL for row in before)  # as float32, they are all off
    assert {row.outcome for row in _judged(rows)} == {Outcome.PASS}
    coarse = [row for row in _judged(rows) if row.dtype == "torch.float32 (tf32)"]
    assert coarse
    for row in coarse:
        assert row.error < 0.5 * row.threshold  # with room for other shapes
        assert row.detection_limit < 0.01
        assert "float32 (tf32)" in row.message


@pytest.mark.parametrize(("name", "operation"), [
    ("conv2d", "convolution_backward"), ("conv1d", "convolution_backward"), ("attention", "bmm"), ("lstm", "mm"),
])  # fmt: skip
def test_what_tf32_cannot_explain_is_found(name: str, operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = _case(name)
    allowed(monkeypatch, *Product)
    with Tf32(wrong=(operation, lambda t: 1.02 * t)):
        rows = audit(model, batch, checks=(NATIVE,))
    wrong = [row for row in rows if row.outcome is Outcome.FAIL]
    assert wrong
    kind = operation.removesuffix("_backward")
    assert any(kind in row.message for row in wrong)
    assert all("(tf32)" in row.cause for row in wrong)


def test_operations_that_do_not_multiply_are_held_to_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed(monkeypatch, *Product)
    with Tf32():
        rows = audit(net(Activation(off_by(1e-3))), classes(), checks=(NATIVE,))
    wrong = [row for row in rows if row.outcome is Outcome.FAIL]
    assert [row.cause for row in wrong] == ["Kernel in torch.float32"]


def test_only_the_kinds_that_are_allowed_are_coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = _case("conv2d")
    allowed(monkeypatch, Product.CONVOLUTION)  # torch's default on a GPU
    with Tf32((Product.CONVOLUTION,)):
        rows = _judged(audit(model, batch, checks=(NATIVE,)))
    assert {row.outcome for row in rows} == {Outcome.PASS}
    coarse = {row.module for row in rows if row.dtype == "torch.float32 (tf32)"}
    assert coarse == {"Conv2d (0)", "Conv2d (3)"} or coarse == {"Conv2d (0)"} or coarse == {"Conv2d (3)"}
    with Tf32():  # the head's product is coarse, and nobody allowed it
        assert any(row.outcome is Outcome.FAIL for row in audit(model, batch, checks=(NATIVE,)))


def off_in_float32(parts: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """A native kernel's fault: float64 never runs it."""
    return tuple(part if part.dtype is torch.float64 else 1.02 * part for part in parts)


class Scaled(torch.autograd.Function):
    """A hand-written linear layer, as good as its products."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.T @ x


class ScaledWrong(Scaled):
    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return off_in_float32(Scaled.backward(ctx, gradient))


class Cores(torch.autograd.Function):
    """A kernel that takes TF32 by itself, whatever torch's switches say; in float64 it multiplies in float64."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return to_tf32(x) @ to_tf32(weight).T

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, weight = ctx.saved_tensors
        return to_tf32(gradient) @ to_tf32(weight), to_tf32(gradient).T @ to_tf32(x)


class CoresWrong(Cores):
    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return off_in_float32(Cores.backward(ctx, gradient))


class Handmade(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.randn(12, 12) / 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function.apply(x, self.weight)


@pytest.mark.parametrize(("function", "wrong"), [
    (Scaled, False), (ScaledWrong, True), (Cores, False), (CoresWrong, True),
])  # fmt: skip
def test_custom_functions_are_judged_by_what_runs_inside(
    function: Any, wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = net(Handmade(function))
    own_cores = issubclass(function, Cores)
    if own_cores:
        rows = audit(model, classes(), checks=(NATIVE,))
    else:
        allowed(monkeypatch, Product.MATMUL)
        with Tf32():
            rows = audit(model, classes(), checks=(NATIVE,))
    (row,) = [r for r in rows if function.__name__ in (r.message or "")]
    assert (row.outcome is Outcome.FAIL) is wrong
    assert row.dtype == ("torch.float32 (coarse, as its forward)" if own_cores else "torch.float32 (tf32)")
    assert {r.outcome for r in _judged(rows) if r is not row} == {Outcome.PASS}


def test_a_switch_on_a_cpu_widens_what_it_touches_and_nothing_else() -> None:
    with switches_kept():
        torch.set_float32_matmul_precision("medium")
        rows = _judged(audit(net(Activation(Swish)), classes(), checks=(NATIVE,)))
        assert {row.outcome for row in rows} == {Outcome.PASS}
        found = {row.dtype for row in rows}
        assert found == {"torch.float32 (bf16)", "torch.float32"}
        rows = audit(net(Activation(off_by(1e-3))), classes(), checks=(NATIVE,))
        assert [row.cause for row in rows if row.outcome is Outcome.FAIL] == ["Kernel in torch.float32"]


@pytest.mark.slow
def test_the_float32_lane_is_an_instrument_and_runs_in_float32() -> None:
    with switches_kept():
        torch.set_float32_matmul_precision("medium")
        seen: list[str] = []

        class Telling(SingleOnly):
            @staticmethod
            def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
                seen.append(torch.backends.mkldnn.matmul.fp32_precision)
                return SingleOnly.forward(ctx, x)

        rows = audit(net(Activation(Telling)), classes(), method="probe")
        assert {row.lane for row in rows if row.check == FINITE} == {Lane.FLOAT32}
        assert "ieee" in seen
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
