"""The native-dtype oracle: kernels that agree, planted ones that do not; and models without float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from audits.outcomes import Lane, Outcome
from tests.audits.gradients.cases import NATIVE, Activation, Swish, audit, classes, failing, net


def off_by(relative: float) -> type[torch.autograd.Function]:
    """A kernel whose backward is off in low precision only, as a fused native kernel's may be."""

    class Kernel(Swish):
        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            out = Swish.backward(ctx, gradient)
            return out if out.dtype is torch.float64 else out * (1 + relative)

    return Kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_healthy_operations_pass(dtype: torch.dtype) -> None:
    model = nn.Sequential(
        nn.Linear(8, 12), nn.LayerNorm(12), nn.GELU(), nn.TransformerEncoderLayer(12, 3, 24), nn.Softmax(-1),
        nn.Linear(12, 3),
    )  # fmt: skip
    batch = {"x": torch.randn(16, 8).to(dtype), "y": torch.randint(0, 3, (16,))}
    rows = audit(model.to(dtype), batch, checks=(NATIVE,))
    judged = [row for row in rows if row.outcome is not Outcome.SKIPPED]
    assert {row.outcome for row in judged} == {Outcome.PASS}
    assert len(judged) >= 6
    for row in judged:
        assert row.lane is Lane.NATIVE
        assert row.error <= row.threshold
    whole = rows[-1]
    assert whole.cause == "measured only"
    assert 0 < whole.measured < 0.2


@pytest.mark.parametrize(("dtype", "relative", "found"), [
    (torch.float32, 1e-3, True), (torch.float32, 1e-7, False), (torch.bfloat16, 0.5, True),
    (torch.bfloat16, 1e-3, False),
])  # fmt: skip
def test_a_wrong_native_kernel_is_named(dtype: torch.dtype, relative: float, found: bool) -> None:
    model = net(Activation(off_by(relative))).to(dtype)
    batch = {"x": torch.randn(16, 8).to(dtype), "y": torch.randint(0, 3, (16,))}
    assert not failing(audit(model, batch, method="probe"))  # float64 never runs it
    rows = [row for row in audit(model, batch, checks=(NATIVE,)) if row.outcome is Outcome.FAIL]
    assert bool(rows) is found
    for row in rows:
        assert "Kernel" in row.message
        assert row.module == "Activation (1)"


def test_float64_models_have_no_native_rows() -> None:
    batch = {"x": torch.randn(16, 8).double(), "y": torch.randint(0, 3, (16,))}
    assert audit(net(nn.ReLU()).double(), batch, checks=(NATIVE,)) == []


class SingleOnly(torch.autograd.Function):
    """A kernel that knows no float64."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        if x.dtype is not torch.float32:
            raise RuntimeError("\"single_only\" not implemented for 'Double'")
        ctx.save_for_backward(x)
        return torch.tanh(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (1 - torch.tanh(x) ** 2)


class WrongSingleOnly(SingleOnly):
    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return 1.3 * SingleOnly.backward(ctx, gradient)


@pytest.mark.slow
def test_models_without_float64_kernels_fall_back_to_float32() -> None:
    rows = audit(net(Activation(SingleOnly)), classes(), method="probe")
    assert {row.lane for row in rows} == {Lane.FLOAT32}
    assert not failing(rows)
    # what six probes resolve in float32; two would resolve a few parts in a thousand
    assert all(row.detection_limit < 2e-3 for row in rows)
    assert sum(row.outcome is Outcome.PASS for row in rows) >= len(rows) / 2
    wrong = audit(net(Activation(WrongSingleOnly)), classes(), method="probe")
    assert "0.weight" in failing(wrong)
    assert not failing(wrong) & {"2.weight", "2.bias", "4.weight", "4.bias"}


def test_a_model_that_refuses_float64_in_any_way_is_answered() -> None:
    class Refusing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.dtype is torch.float32
            return x

    class Crashing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.dtype is torch.float64:
                raise KeyError("no such kernel")
            return x

    assert {row.lane for row in audit(net(Refusing()), classes(), method="probe")} == {Lane.FLOAT32}
    rows = audit(net(Crashing()), classes(), method="probe")
    assert {row.outcome for row in rows} == {Outcome.INCONCLUSIVE}
    assert "no such kernel" in rows[0].message
