"""Kernels that compute in float32 whatever comes in: right ones are resolved, wrong ones fail by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from audits.gradients.methods.probe import LADDER, Prober
from audits.lanes.evaluation import Point
from audits.lanes.lifted_loss import lifted_loss
from audits.lanes.opaque import ROUGH_NOISE, is_opaque
from audits.live.subject import open_subject
from audits.outcomes import Lane, Outcome, ResultRow
from audits.recipe.recipe import Recipe
from audits.settings import AuditSettings
from tests.audits.gradients.cases import FINITE, Activation, Swish, audit, classes, net

PRECISIONS = ("float32", "bfloat16", "bf16-autocast")


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().to(torch.float32).numpy()


def _tensor(array: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)).to(like.dtype)


def rms_norm(coupling: float = 1.0, forgotten: int = 0) -> Any:
    """RMSNorm in NumPy's float32; wrong unless the mean's part of the backward is whole and no column forgotten."""

    class OpaqueRms(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x, weight)
            values = _array(x)
            root = 1 / np.sqrt(np.square(values).mean(-1, keepdims=True) + np.float32(1e-6))
            return _tensor(values * root * _array(weight), x)

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
            x, weight = ctx.saved_tensors
            values, arriving = _array(x), _array(gradient)
            root = 1 / np.sqrt(np.square(values).mean(-1, keepdims=True) + np.float32(1e-6))
            normal, wanted = values * root, arriving * _array(weight)
            dx = root * (wanted - np.float32(coupling) * normal * (wanted * normal).mean(-1, keepdims=True))
            if forgotten:
                dx[..., -forgotten:] = 0
            return _tensor(dx, x), _tensor((arriving * normal).reshape(-1, values.shape[-1]).sum(0), weight)

    return OpaqueRms


class Rms(nn.Module):
    def __init__(self, function: Any, width: int) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(1 + 0.1 * torch.randn(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function.apply(x, self.weight)


class Net(nn.Module):
    def __init__(self, function: Any, width: int = 32) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(31, width), Rms(function, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.last, self.head = Rms(function, width), nn.Linear(width, 31)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x)
        h = h + self.down(F.gelu(self.up(self.norm(h))))
        return self.head(self.last(h))


def _loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch["x"]).flatten(0, 1).float(), batch["y"].flatten())


def _rows(function: Any, precision: str) -> list[ResultRow]:
    torch.manual_seed(0)
    model = Net(function)
    if precision == "bfloat16":
        model.to(torch.bfloat16)
    batch = {"x": torch.randint(0, 31, (6, 8)), "y": torch.randint(0, 31, (6, 8))}
    chosen = precision if "autocast" in precision else "native"
    return audit(model, batch, _loss, precision=chosen, method="probe", checks=("gradient.*",))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_right_kernel_is_resolved(precision: str) -> None:
    rows = _rows(rms_norm(), precision)
    assert [row.message for row in rows if row.outcome is Outcome.FAIL] == []
    judged = [row for row in rows if row.check == FINITE]
    assert {row.outcome for row in judged} == {Outcome.PASS}
    assert {row.lane for row in judged} == {Lane.FLOAT64}
    assert all(row.detection_limit <= 1e-3 for row in judged)


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("coupling", "forgotten"), [(0.9, 0), (0.0, 0), (1.0, 8)])
def test_a_wrong_kernel_fails_by_name(coupling: float, forgotten: int, precision: str) -> None:
    rows = [row for row in _rows(rms_norm(coupling, forgotten), precision) if row.check == FINITE]
    wrong = {row.parameter for row in rows if row.outcome is Outcome.FAIL}
    assert "embed.weight" in wrong  # upstream of both norms
    assert not wrong & {"head.weight", "head.bias", "last.weight"}  # downstream of what is wrong
    assert any("OpaqueRms" in row.message for row in rows if row.outcome is Outcome.FAIL)


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1.003, 1.0])
def test_an_error_above_the_limit_is_found(factor: float) -> None:
    class Stretched(rms_norm()):  # type: ignore[misc]
        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
            dx, dw = super(Stretched, Stretched).backward(ctx, gradient)
            return dx * factor, dw

    rows = [row for row in _rows(Stretched, "float32") if row.check == FINITE]
    assert any(row.outcome is Outcome.FAIL for row in rows) is (factor != 1.0)


def _prober(model: nn.Module, batch: Any, loss: Any) -> Any:
    recipe = Recipe.capture(model, batch=batch, loss=loss, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    return open_subject(model, recipe, AuditSettings(), device="cpu")


def test_the_noise_of_a_staircase_is_measured_across_its_steps() -> None:
    torch.manual_seed(0)
    batch = {"x": torch.randint(0, 31, (6, 8)), "y": torch.randint(0, 31, (6, 8))}
    with (
        _prober(Net(rms_norm()), batch, _loss) as subject,
        lifted_loss(subject, subject.phases[0]) as problem,
    ):
        assert is_opaque(problem)
        ratios = []
        for seed in range(5):
            prober = Prober(Point(problem), seed)
            prober.measure(prober.everywhere(3e-3), 3e-3)
            near = prober.sigma
            assert prober.noise_ratio > ROUGH_NOISE
            direction = prober.everywhere(6e-2)
            places = np.linspace(-1e-3, 1e-3, 40)
            values = np.array([prober.point.along(direction, 6e-2 + float(t)) for t in places])
            truth = float(np.std(values - np.polyval(np.polyfit(places, values, 5), places)))
            prober.coarsen(6e-2)
            assert near < truth < 2 * prober.sigma
            ratios.append(prober.sigma / truth)
            scales = {name: prober.rms[name] for name in ("head.bias",)}
            assert prober.best_step(scales) in LADDER
            prober.point.restore()
        assert float(np.median(ratios)) < 4


def test_what_a_mode_can_lift_is_not_opaque() -> None:
    batch = classes()
    loss = lambda model, batch: F.cross_entropy(model(batch["x"]), batch["y"])  # noqa: E731
    for middle, opaque in ((nn.ReLU(), False), (Activation(Swish), True)):
        with (
            _prober(net(middle), batch, loss) as subject,
            lifted_loss(subject, subject.phases[0]) as problem,
        ):
            assert is_opaque(problem) is opaque
            prober = Prober(Point(problem), 0)
            prober.measure(prober.everywhere(3e-3), 3e-3)
            assert prober.noise_ratio < ROUGH_NOISE  # a Function written in torch's operators is smooth in float64
            prober.point.restore()


def test_foreign_operators_are_seen() -> None:
    @torch.library.custom_op("gradaudit_tests::doubled", mutates_args=())
    def doubled(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    doubled.register_autograd(lambda ctx, gradient: 2 * gradient)

    class Foreign(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return doubled(x)

    loss = lambda model, batch: F.cross_entropy(model(batch["x"]), batch["y"])  # noqa: E731
    with (
        _prober(net(Foreign()), classes(), loss) as subject,
        lifted_loss(subject, subject.phases[0]) as problem,
    ):
        assert is_opaque(problem)
