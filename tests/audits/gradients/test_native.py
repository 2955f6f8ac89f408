"""The native-dtype oracle: kernels that agree, planted ones that do not; and models without float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from audits import Recipe
from audits.gradients.native.native_calls import collect_calls, tensors_of
from audits.gradients.native.vector_products import distance, vjp
from audits.live.subject import open_subject
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


class WritesIntoItsWeight(torch.autograd.Function):
    """A forward that scales its second argument in place and puts it back: nobody's parameter may feel it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        weight.data.add_(1e-3)
        return x * (weight - 1e-3)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        return gradient * weight, (gradient * x).sum(0)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return WritesIntoItsWeight.apply(x, self.weight)


def test_calls_hold_the_models_own_parameters_and_copies_of_all_else() -> None:
    model = net(nn.Identity())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = Recipe.capture(model, batch=classes(), loss="cross_entropy", optimizer=optimizer)
    with open_subject(model, recipe, device="cpu") as subject:
        calls, left_out = collect_calls(subject, subject.phases[0])
        own = {p.data_ptr() for p in subject.model.parameters()}
        linear = next(call for call in calls if call.name == "addmm")
        assert [t.data_ptr() in own for t in tensors_of(linear.args)] == [True, False, True]
        assert not left_out


def test_a_call_that_writes_into_a_parameter_is_judged_on_a_copy() -> None:
    model = net(Scaled())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = Recipe.capture(model, batch=classes(), loss="cross_entropy", optimizer=optimizer)
    with open_subject(model, recipe, device="cpu") as subject:
        calls, _ = collect_calls(subject, subject.phases[0])
        call = next(call for call in calls if call.own)
        before = subject.model[1].weight.clone()
        assert vjp(call.run, call.args, call.kwargs, 0, writes=call.writes) is not None
        assert torch.equal(subject.model[1].weight, before)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_a_distance_reads_tensors_in_the_order_they_lie_in(order: tuple[int, int, int]) -> None:
    first, second = torch.randn(3, 5, 7).permute(order), torch.randn(3, 5, 7).permute(order)
    far = float((first.double() - second.double()).norm())
    assert distance([first], [second]) == pytest.approx(far, rel=1e-12)
    assert distance([first], [second.contiguous()]) == pytest.approx(far, rel=1e-12)
    assert distance([first.contiguous(), None], [None, second]) == pytest.approx(
        float(torch.stack([first.norm(), second.norm()]).double().norm()), rel=1e-6
    )


class Spectrum(nn.Module):
    """Functions of eigenvalues and projections, which no sign of an eigenvector changes."""

    def __init__(self, of: str) -> None:
        super().__init__()
        self.inner, self.of = nn.Linear(8, 25), of

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.inner(x).view(-1, 5, 5)
        symmetric = a @ a.mT + 0.3 * torch.eye(5, dtype=a.dtype)
        if self.of == "eigvalsh":
            return torch.linalg.eigvalsh(symmetric).log()
        if self.of == "eigh":
            values, vectors = torch.linalg.eigh(symmetric)
            return ((vectors * values.log()[:, None]) @ vectors.mT).flatten(1)
        u, s, v = torch.linalg.svd(a)
        return ((u @ v) + s[:, None]).flatten(1)


@pytest.mark.sampled(cases=4)
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("of", ["eigvalsh", "eigh", "svd"])
def test_eigenvectors_have_no_sign(of: str, seed: int) -> None:
    torch.manual_seed(seed)
    batch = {"x": torch.randn(6, 8), "y": torch.randn(6, 5 if of == "eigvalsh" else 25)}
    rows = audit(Spectrum(of), batch, "mse_loss", checks=(NATIVE,))
    judged = [row for row in rows if row.outcome is not Outcome.SKIPPED]
    assert any("eigh" in row.message or "svd" in row.message for row in judged)
    assert {row.outcome for row in judged} == {Outcome.PASS}


class Stretched(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * 1.01


@pytest.mark.parametrize("name", ["_linalg_eigh", "_linalg_svd"])
def test_products_of_eigenvectors_differ_by_what_is_wrong_and_not_by_signs(name: str) -> None:
    a = torch.randn(3, 5, 5, dtype=torch.float64)
    a = a + a.mT if name == "_linalg_eigh" else a
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0], dtype=torch.float64)

    def plain(x: torch.Tensor) -> Any:
        return torch.linalg.eigh(x) if name == "_linalg_eigh" else torch.linalg.svd(x)

    def turned(x: torch.Tensor) -> Any:
        first, second, *third = plain(x)
        if name == "_linalg_eigh":
            return first, second * signs
        return first * signs, second, third[0] * signs[:, None]

    def stretched(x: torch.Tensor) -> Any:
        return plain(Stretched.apply(x))

    meant = vjp(plain, (a,), {}, 0, name=name)
    assert meant is not None
    size = distance(meant)
    assert size > 1.0
    assert distance(meant, vjp(turned, (a,), {}, 0, name=name)) <= 1e-12 * size
    assert distance(meant, vjp(stretched, (a,), {}, 0, name=name)) == pytest.approx(0.01 * size, rel=1e-6)
