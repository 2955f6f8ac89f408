"""Buffers of EMA shadows: every way that libraries follow them passes, one left behind does not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, get_swa_avg_fn

from audits.outcomes import Outcome, ResultRow
from tests.audits.updates.subjects import audited, of

DECAY = 0.9


class Net(nn.Module):
    def __init__(self, momentum: float | None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4, momentum=momentum)
        self.head = nn.Linear(4, 3)
        self.register_buffer("table", torch.arange(3.0))
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen.add_(1.0)
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3))) + self.table


class Pair(nn.Module):
    """A student and its shadow, which has fallen behind."""

    def __init__(self, teacher: Callable[[nn.Module], nn.Module], momentum: float | None) -> None:
        super().__init__()
        self.student = Net(momentum)
        self.teacher = teacher(self.student)
        self.teacher.requires_grad_(False)
        with torch.no_grad():
            for parameter in self.teacher.parameters():
                parameter.mul_(0.9)
            for name, buffer in self.teacher.named_buffers():
                if "running" in name:
                    buffer.add_(0.1)
                elif name == "n_averaged":
                    buffer.fill_(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.student(x)


def _loss(model: Any, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"])


def _update_parameters(model: Any) -> None:
    model.teacher.update_parameters(model.student)


@torch.no_grad()
def _average(model: Any, decay: float = DECAY) -> None:
    for shadow, weight in zip(model.teacher.parameters(), model.student.parameters(), strict=True):
        shadow.lerp_(weight, 1 - decay)


def _states(model: Any) -> Any:
    return zip(model.teacher.state_dict().values(), model.student.state_dict().values(), strict=True)


@torch.no_grad()
def _timm_v2(model: Any) -> None:
    for shadow, value in _states(model):
        shadow.copy_(DECAY * shadow + (1.0 - DECAY) * value)


@torch.no_grad()
def _timm_v3(model: Any) -> None:
    for shadow, value in _states(model):
        shadow.lerp_(value, 1.0 - DECAY) if shadow.is_floating_point() else shadow.copy_(value)


@torch.no_grad()
def _floats_only(model: Any) -> None:
    """As in YOLO's and ema_pytorch's averages: integers are left alone."""
    for shadow, value in _states(model):
        if shadow.is_floating_point():
            shadow.mul_(DECAY).add_(value, alpha=1.0 - DECAY)


def _copied(model: Any) -> None:
    _average(model)
    for shadow, value in zip(model.teacher.buffers(), model.student.buffers(), strict=True):
        shadow.copy_(value)


def _averaged_model(**options: Any) -> Callable[[nn.Module], nn.Module]:
    return lambda model: AveragedModel(model, **options)


Case = tuple[Callable[[nn.Module], nn.Module], Callable[[Any], None], float | None]

RIGHT: dict[str, Case] = {
    "AveragedModel, copied": (_averaged_model(multi_avg_fn=get_ema_multi_avg_fn(DECAY)), _update_parameters, DECAY),
    "AveragedModel, averaged": (
        _averaged_model(multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True), _update_parameters, DECAY,
    ),
    "AveragedModel, avg_fn": (
        _averaged_model(avg_fn=get_ema_avg_fn(DECAY), use_buffers=True), _update_parameters, DECAY,
    ),
    "SWA": (_averaged_model(), _update_parameters, None),
    "SWA, averaged": (
        _averaged_model(avg_fn=get_swa_avg_fn(), use_buffers=True), _update_parameters, None,
    ),
    "ModelEmaV2": (copy.deepcopy, _timm_v2, DECAY),
    "ModelEmaV3": (copy.deepcopy, _timm_v3, DECAY),
    "floats only": (copy.deepcopy, _floats_only, DECAY),
    "copied by hand": (copy.deepcopy, _copied, DECAY),
}  # fmt: skip


def _rows(
    case: Case,
    *,
    declared: bool = True,
    dtype: torch.dtype = torch.float32,
    momentum: float | None = 0.1,
    teacher_runs: bool = False,
    before: bool = False,
    after: Callable[[Any, Any], None] | None = None,
    **how: Any,
) -> list[ResultRow]:
    make, update, decay = case
    torch.manual_seed(0)
    model = Pair(make, momentum).to(dtype)

    def step(m: Any, batch: Any, context: Any) -> None:
        context.optimizer.zero_grad()
        if teacher_runs:
            m.teacher(batch["x"])
        if before:
            update(m)
        _loss(m, batch).backward()
        context.optimizer.step()
        if not before:
            update(m)
        if after is not None:
            after(m, batch)

    ema = {"source": "student", **({} if decay is None else {"decay": decay}), **how}
    return audited(
        model,
        batch={"x": torch.randn(8, 2, 6, 6).to(dtype), "y": torch.randint(0, 3, (8,))},
        loss=_loss,
        optimizer=torch.optim.SGD(model.student.parameters(), lr=0.1),
        step=step,
        expect={"ema": {"teacher": ema}} if declared else {},
    )


def _findings(rows: list[ResultRow]) -> list[tuple[str | None, Outcome]]:
    return [(r.parameter, r.outcome) for r in of(rows, "buffers.ema") if r.outcome is not Outcome.PASS
            and r.cause != "did not move"]  # fmt: skip


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("momentum", [0.1, None], ids=["momentum", "cumulative"])
@pytest.mark.parametrize("name", RIGHT)
def test_every_way_that_libraries_follow_buffers_passes(name: str, dtype: torch.dtype, momentum: float | None) -> None:
    rows = _rows(RIGHT[name], dtype=dtype, momentum=momentum)
    assert _findings(rows) == []
    assert [r.message for r in rows if r.outcome is Outcome.FAIL] == []
    judged = {r.parameter for r in of(rows, "buffers.ema") if r.outcome is Outcome.PASS}
    prefix = "teacher.module." if name.startswith(("Averaged", "SWA")) else "teacher."
    assert {f"{prefix}norm.{b}" for b in ("running_mean", "running_var", "num_batches_tracked")} <= judged


@pytest.mark.parametrize("name", ["AveragedModel, copied", "AveragedModel, averaged", "AveragedModel, avg_fn", "SWA"])
def test_an_averaged_model_of_torchs_own_rule_is_found_undeclared(name: str) -> None:
    rows = _rows(RIGHT[name], declared=False)
    assert [r.message for r in rows if r.outcome is Outcome.FAIL] == []
    assert {r.outcome for r in of(rows, "buffers.ema", "teacher.module.norm.running_mean")} == {Outcome.PASS}


@pytest.mark.parametrize("update", [_average, _timm_v3, _copied])
def test_a_teacher_in_train_mode_moves_its_own_statistics(update: Any) -> None:
    """As in MoCo: the momentum encoder normalises by its own batches, whatever becomes of its statistics after."""
    assert _findings(_rows((copy.deepcopy, update, DECAY), teacher_runs=True)) == []


def test_forwards_of_the_source_after_the_average_are_no_fault() -> None:
    """A GAN's discriminator phase may run the generator once more after its average was updated."""
    rows = _rows(RIGHT["copied by hand"], after=lambda m, b: [m.student(b["x"]) for _ in range(2)])
    assert _findings(rows) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_statistics_that_stay_behind_fail_where_the_shadow_is_declared(dtype: torch.dtype) -> None:
    rows = _rows((copy.deepcopy, _average, DECAY), dtype=dtype)
    assert _findings(rows) == [("teacher.norm.running_mean", Outcome.FAIL), ("teacher.norm.running_var", Outcome.FAIL)]
    found = of(rows, "buffers.ema", "teacher.norm.running_var")[0]
    assert found.cause == "never updated"
    assert found.module == "BatchNorm2d (teacher.norm)"
    assert "teacher.norm.running_var did not move in step 1, while student.norm.running_var did" in found.message
    assert "copy or average the buffers" in found.message


def test_statistics_that_stay_behind_warn_where_nobody_declared_the_shadow() -> None:
    make = _averaged_model(multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    rows = _rows((make, _average, DECAY), declared=False)
    assert _findings(rows) == [(f"teacher.module.norm.{b}", Outcome.WARN) for b in ("running_mean", "running_var")]


def test_buffers_that_are_left_on_purpose_are_declared() -> None:
    assert _findings(_rows((copy.deepcopy, _average, DECAY), buffers="left")) == []
    assert _findings(_rows(RIGHT["copied by hand"], buffers="copied")) == []
    assert _findings(_rows(RIGHT["ModelEmaV3"], buffers="averaged")) == []
    wrong = of(_rows(RIGHT["ModelEmaV3"], buffers="copied"), "buffers.ema", "teacher.norm.running_mean")
    assert [(r.outcome, "it is averaged" in r.message) for r in wrong] == [(Outcome.FAIL, True)]


def _half_way(model: Any) -> None:
    _average(model)
    for shadow, value in zip(model.teacher.buffers(), model.student.buffers(), strict=True):
        if shadow.is_floating_point():
            shadow.lerp_(value, 0.5)


def _mixed(model: Any) -> None:
    _average(model)
    shadow, source = model.teacher.norm, model.student.norm
    shadow.running_mean.lerp_(source.running_mean, 1 - DECAY)
    shadow.running_var.copy_(source.running_var)


def _counted(model: Any) -> None:
    _copied(model)
    model.teacher.norm.num_batches_tracked.add_(5)


@pytest.mark.parametrize(
    ("update", "before", "parameter", "text"),
    [
        (_half_way, False, "teacher.norm.running_mean", "it moved 0.5 of the way (decay 0.5)"),
        (_copied, True, "teacher.norm.running_var", "it is what that was before the step"),
        (_mixed, False, "teacher.norm.running_mean", "running_mean is averaged, running_var is copied"),
        (_counted, False, "teacher.norm.num_batches_tracked", "is not student.norm.num_batches_tracked copied"),
    ],
    ids=["another decay", "before the step", "mean averaged, variance copied", "counted by another number"],
)
def test_statistics_that_follow_wrongly_fail(update: Any, before: bool, parameter: str, text: str) -> None:
    rows = _rows((copy.deepcopy, update, DECAY), before=before)
    found = [r for r in of(rows, "buffers.ema", parameter) if r.outcome is Outcome.FAIL]
    assert found
    assert text in found[0].message
