"""What a GPU's kernels do otherwise than the CPU's made right models fail there: here they pass, their twins fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import audits
from audits.lanes import emulation
from audits.outcomes import Outcome
from audits.report import AuditReport
from tests.accelerator import NAME
from tests.accelerator.as_cuda import SIXTH

pytestmark = pytest.mark.accelerator


class Lora(nn.Module):
    """An adapter behind a dropout, its second half at zero as it is before training."""

    def __init__(self, inputs: int, outputs: int, factor: float = 1.0) -> None:
        super().__init__()
        self.base, self.dropout, self.factor = nn.Linear(inputs, outputs).requires_grad_(False), nn.Dropout(0.2), factor
        self.down, self.up = nn.Linear(inputs, 4, bias=False), nn.Linear(4, outputs, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(self.down(self.dropout(x)))
        if self.factor != 1.0 and h.requires_grad:
            h.register_hook(lambda gradient: gradient * self.factor)
        return self.base(x) + h


class SqueezeExcite(nn.Module):
    """Both hard activations, with values on all their sides."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.first, self.gate, self.last, self.factor = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3), factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.hardswish(4 * self.first(x))
        gate = 6 * self.gate(h)
        if self.factor != 1.0 and gate.requires_grad:
            gate.register_hook(lambda gradient: gradient * self.factor)
        return self.last(h * F.hardsigmoid(gate))


class Penalised(nn.Module):
    """A hard activation whose backward is part of the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(F.hardswish(4 * self.first(x)))


def penalised(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    x = batch["x"].detach().requires_grad_()
    loss = F.cross_entropy(model(x), batch["y"])
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    return loss + slope.square().sum()


def normed(dim: int = 0) -> nn.Module:
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(8, 16), dim=dim)
    return nn.Sequential(linear, nn.Tanh(), nn.Linear(16, 3))


class OffNorm(nn.Module):
    """Weight normalisation whose backward leaves out that the length depends on the direction, by a thousandth."""

    def __init__(self) -> None:
        super().__init__()
        self.direction, self.length = nn.Parameter(torch.randn(16, 8)), nn.Parameter(torch.ones(16, 1))
        self.last = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, _ = torch._weight_norm_interface(self.direction, self.length, 0)
        if weight.requires_grad:
            weight.register_hook(lambda gradient: gradient * 1.001)
        return self.last(torch.tanh(x @ weight.T))


def audited(model: nn.Module, loss: Any = "cross_entropy", **settings: Any) -> AuditReport:
    batch = {"x": torch.randn(16, 8), "y": torch.randint(0, 3, (16,))}
    held = [p for p in model.parameters() if p.requires_grad]
    recipe = audits.Recipe.capture(model, batch=batch, loss=loss, optimizer=torch.optim.AdamW(held))
    return audits.audit(model, recipe, device=NAME, settings=audits.AuditSettings(checks=("gradient.*",), **settings))


def complaints(report: AuditReport) -> list[str]:
    return [f"{r.outcome} {r.check} {r.parameter}: {r.message}" for r in report.rows
            if r.outcome in (Outcome.FAIL, Outcome.INCONCLUSIVE)]  # fmt: skip


def test_the_device_computes_as_cuda_does() -> None:
    x = torch.linspace(-4, 4, 9, dtype=torch.float64)
    there = F.hardsigmoid(x.to(NAME)).cpu()
    assert torch.equal(there, (x + 3).clamp(0, 6) * SIXTH)
    assert not torch.equal(there, F.hardsigmoid(x))
    v, g = torch.randn(8, 16, dtype=torch.float64), torch.rand(8, 1, dtype=torch.float64)
    _, norms = torch._weight_norm_interface(v.to(NAME), g.to(NAME))
    off = (norms.cpu() / v.norm(dim=1, keepdim=True) - 1).abs().max()
    assert 1e-10 < off < 1e-7
    masks = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        masks.append(F.dropout(torch.ones(64, dtype=dtype, device=NAME)) != 0)
    assert not torch.equal(*masks)


@pytest.mark.parametrize("method", ["exact", "probe"])
@pytest.mark.parametrize(
    "build",
    [lambda: nn.Sequential(Lora(8, 16), nn.SiLU(), Lora(16, 3)), SqueezeExcite, normed, lambda: normed(1)],
    ids=["dropout before an adapter at zero", "hard activations", "weight norm", "weight norm of the last dimension"],
)
def test_right_models_pass(build: Callable[[], nn.Module], method: str) -> None:
    torch.manual_seed(0)
    assert complaints(audited(build(), method=method)) == []


def test_a_penalty_through_a_hard_activation_passes() -> None:
    torch.manual_seed(0)
    assert complaints(audited(Penalised(), penalised)) == []


@pytest.mark.parametrize("method", ["exact", "probe"])
@pytest.mark.parametrize(
    ("build", "wrong"),
    [
        # the two first have no gradient while the adapters are zero: theirs is wrong a little away from there
        (
            lambda: nn.Sequential(Lora(8, 16), nn.SiLU(), Lora(16, 3, 1.01)),
            {"0.down.weight", "2.down.weight", "2.up.weight"},
        ),
        (lambda: SqueezeExcite(1.01), {"first.weight", "first.bias", "gate.weight", "gate.bias"}),
        (OffNorm, {"direction", "length"}),
    ],
    ids=["adapter", "hard activations", "weight norm"],
)
def test_their_twins_fail(build: Callable[[], nn.Module], wrong: set[str], method: str) -> None:
    torch.manual_seed(0)
    report = audited(build(), method=method)
    failing = {r.parameter for r in report.rows
               if r.outcome is Outcome.FAIL and r.check == "gradient.finite-difference"}  # fmt: skip
    assert failing == wrong


@pytest.mark.parametrize("build", [normed, OffNorm])
def test_an_operator_nobody_knows_to_be_coarse_makes_no_alarm(
    build: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel is left as it is: its steps are seen before anything fails, and a fault is found in spite of them."""
    monkeypatch.setattr(emulation, "_EMULATED_ELSEWHERE", {})
    torch.manual_seed(0)
    report = audited(build(), method="probe")
    failing = {r.parameter for r in report.rows if r.outcome is Outcome.FAIL}
    assert failing == ({"direction", "length"} if build is OffNorm else set())


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.run, self.head = nn.Embedding(9, 6), nn.GRU(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(self.embed(x), lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.run(packed)[1][-1])


def packed_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch["x"], batch["lengths"]), batch["y"])


def ctc_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.ctc_loss(model(batch["x"]).log_softmax(-1), batch["y"], torch.full((3,), 8), torch.full((3,), 4))


@pytest.mark.parametrize(
    ("build", "batch", "loss"),
    [
        (Packed, {"x": (0, 9, (4, 7)), "y": (0, 3, (4,)), "lengths": [7, 5, 3, 2]}, packed_loss),
        (lambda: nn.Linear(6, 5), {"x": (8, 3, 6), "y": (1, 5, (3, 4))}, ctc_loss),
    ],
    ids=["of packed sequences", "of ctc_loss"],
)
def test_lengths_stay_on_the_cpu(build: Callable[[], nn.Module], batch: dict[str, Any], loss: Any) -> None:
    """torch wants the lengths of packed sequences there, and takes ctc_loss's from there."""
    torch.manual_seed(0)
    made = {}
    for name, how in batch.items():
        if isinstance(how, list):
            made[name] = torch.tensor(how)
        else:
            made[name] = torch.randint(*how) if isinstance(how[-1], tuple) else torch.randn(*how)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters())
    recipe = audits.Recipe.capture(model, batch=made, loss=loss, optimizer=optimizer)
    report = audits.audit(model, recipe, device=NAME)
    assert report.outcome is Outcome.PASS
    assert report.limits == ()
