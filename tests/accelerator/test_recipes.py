"""What training scripts do, on the device: what the audit says there is what it says on the CPU."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import audits
from audits.live.lending import takes_storage_of
from audits.live.subject import open_subject
from audits.recipe.phases import Phase
from tests.accelerator import NAME
from tests.accelerator.comparing import both, failing
from tests.accelerator.test_optimizers import Small, loss, trained
from tests.audits.gradients.test_declared_gradients import Net, Spike
from tests.wrong_on_purpose.updates import models

pytestmark = pytest.mark.accelerator


def gan() -> tuple[nn.Module, dict[str, Any]]:
    model, batch = models.gan()
    phases = [Phase(name, loss=loss, optimizer=torch.optim.Adam(part.parameters(), lr=1e-3))
              for name, loss, part in (("discriminator", models.discriminate, model.discriminator),
                                       ("generator", models.generate, model.generator))]  # fmt: skip

    def step(m: Any, b: Any, context: Any) -> None:
        for phase in phases:
            context.optimizers[phase.name].zero_grad()
            phase.loss(m, b).backward()
            context.optimizers[phase.name].step()

    return model, {"batch": batch, "phases": phases, "step": step}


def accumulated() -> tuple[nn.Module, dict[str, Any]]:
    model, batch = models.gpt()
    targets = batch["targets"].clone()
    targets[0, :3] = -100
    halves = [{"tokens": batch["tokens"][rows], "targets": targets[rows]} for rows in (slice(0, 2), slice(2, 4))]
    optimizer = torch.optim.AdamW(model.parameters())
    models.train(model, batch, models.next_token, optimizer)
    return model, {"batch": halves, "loss": models.next_token, "optimizer": optimizer, "normalize": "tokens:targets",
                   "clip_grad_norm": 0.1}  # fmt: skip


def batch_norm() -> tuple[nn.Module, dict[str, Any]]:
    model, batch = models.conv()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    models.train(model, batch, models.classify, optimizer)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    return model, {"batch": batch, "loss": models.classify, "optimizer": optimizer, "scheduler": scheduler,
                   "accumulate": 2}  # fmt: skip


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.rnn = nn.Embedding(23, 6, sparse=True), nn.LSTM(6, 8, batch_first=True)
        self.attention, self.head = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.rnn(self.words(x))[0]
        return self.head(self.attention(hidden, hidden, hidden)[0].mean(1))


def two_optimizers() -> tuple[nn.Module, dict[str, Any]]:
    """Sparse embeddings by SparseAdam, the rest by AdamW, both with their state."""
    model = Recurrent()
    batch = {"x": torch.randint(0, 23, (6, 5)), "y": torch.randint(0, 3, (6,))}
    rest = [p for n, p in model.named_parameters() if not n.startswith("words")]
    optimizers = (torch.optim.SparseAdam(model.words.parameters()), torch.optim.AdamW(rest))
    for _ in range(2):
        for optimizer in optimizers:
            optimizer.zero_grad()
        models.classify(model, batch).backward()
        for optimizer in optimizers:
            optimizer.step()
    phases = [Phase(name, loss=models.classify, optimizer=optimizer)
              for name, optimizer in zip(("words", "rest"), optimizers, strict=True)]  # fmt: skip
    return model, {"batch": batch, "phases": phases}


def half_precision() -> tuple[nn.Module, dict[str, Any]]:
    model, batch = models.conv()
    optimizer = torch.optim.AdamW(model.parameters())
    models.train(model, batch, models.classify, optimizer)
    return model, {"batch": batch, "loss": models.classify, "optimizer": optimizer}


class Distilled(nn.Module):
    """A BatchNorm net and the shadow that follows it, buffers and all."""

    def __init__(self) -> None:
        super().__init__()
        self.student, _ = models.conv()
        self.teacher, _ = models.conv()
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.teacher(x)  # in train mode: its statistics are its own
        return self.student(x)


def shadow() -> tuple[nn.Module, dict[str, Any]]:
    model, (_, batch) = Distilled(), models.conv()

    def step(m: Any, b: Any, context: Any) -> None:
        context.optimizer.zero_grad()
        models.classify(m, b).backward()
        context.optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(m.teacher.parameters(), m.student.parameters(), strict=True):
                slow.lerp_(fast, 0.1)

    optimizer = torch.optim.AdamW(model.student.parameters())
    return model, {"batch": batch, "loss": models.classify, "optimizer": optimizer, "step": step,
                   "expect": {"ema": {"teacher": {"source": "student", "decay": 0.9}}}}  # fmt: skip


def equal_average() -> tuple[nn.Module, dict[str, Any]]:
    """In float64, where a share of 1 / n worked out in float32 shows."""
    model, batch = nn.Module(), models.mlp()[1]
    model.student = models.mlp()[0].double()
    model.teacher = torch.optim.swa_utils.AveragedModel(model.student)
    model.teacher.n_averaged.fill_(3)
    model.teacher.requires_grad_(False)
    batch = {"x": batch["x"].double(), "y": batch["y"]}

    def loss(m: Any, b: Any) -> torch.Tensor:
        return models.classify(m.student, b)

    def step(m: Any, b: Any, context: Any) -> None:
        context.optimizer.zero_grad()
        loss(m, b).backward()
        context.optimizer.step()
        m.teacher.update_parameters(m.student)

    optimizer = torch.optim.SGD(model.student.parameters(), lr=0.1)
    return model, {"batch": batch, "loss": loss, "optimizer": optimizer, "step": step}


def own_groups() -> tuple[nn.Module, dict[str, Any]]:
    """A step that shuffles the rows and takes them in two parts: each has its own dropout and its own statistics."""
    model, batch = (
        nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Dropout(0.2), nn.Linear(12, 4)),
        models.mlp()[1],
    )

    def step(m: Any, b: Any, context: Any) -> None:
        context.optimizer.zero_grad()
        order = torch.randperm(len(b["x"]), generator=torch.Generator().manual_seed(1)).to(b["x"].device)
        for rows in order.chunk(2):
            part = {"x": b["x"][rows], "y": b["y"][rows]}
            (models.classify(m, part) * len(rows) / len(order)).backward()
        context.optimizer.step()

    optimizer = torch.optim.AdamW(model.parameters())
    return model, {"batch": batch, "loss": models.classify, "optimizer": optimizer, "step": step}


def low_rank_muon() -> tuple[nn.Module, dict[str, Any]]:
    """Fewer rows than a layer is wide: what bfloat16 rounds in Muon's iterations is as large as its update."""
    model = nn.Sequential(nn.Linear(6, 32, bias=False), nn.GELU(), nn.Linear(32, 3, bias=False))
    _, batch = models.mlp()
    optimizer = torch.optim.Muon(model.parameters(), lr=1e-2)
    return model, {"batch": batch, "loss": models.classify, "optimizer": optimizer}


def declared_gradient() -> tuple[nn.Module, dict[str, Any]]:
    """A surrogate gradient, taken as it is declared."""
    model, batch = Net(Spike), {"inputs": torch.randn(12, 8), "targets": torch.arange(12) % 3}
    optimizer = torch.optim.AdamW(model.parameters())
    return model, {"batch": batch, "loss": "cross_entropy", "optimizer": optimizer,
                   "expect": {"custom_gradient": ["Spike"]}}  # fmt: skip


def line_search() -> tuple[nn.Module, dict[str, Any]]:
    model, batch = models.mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = models.classify(model, batch)
        value.backward()
        return value

    optimizer.step(closure)
    return model, {"batch": batch, "loss": models.classify, "optimizer": optimizer}


@pytest.mark.sampled(cases=4)
@pytest.mark.parametrize(
    "build",
    [
        gan,
        accumulated,
        batch_norm,
        two_optimizers,
        shadow,
        equal_average,
        own_groups,
        low_rank_muon,
        declared_gradient,
        line_search,
    ],
    ids=lambda b: b.__name__,
)
def test_says_what_the_cpu_says(build: Any) -> None:
    assert failing(both(build)) == []


@pytest.mark.parametrize("precision", ["bf16-autocast", "fp16-autocast"])
def test_mixed_precision_passes(precision: str) -> None:
    """Alone: what autocast lowers differs between devices."""
    model, arguments = half_precision()
    report = audits.audit(model, audits.Recipe.capture(model, **arguments, precision=precision), device=NAME)
    assert failing(report) == []
    assert report.coverage == 1.0


def test_everything_is_as_it_was() -> None:
    model, recipe = trained("AdamW", {}, 2, "cpu")
    seen: list[torch.Tensor] = []
    model.first.weight.register_hook(seen.append)
    before = {name: (p, p.detach().clone(), p.data_ptr()) for name, p in model.named_parameters()}
    state = (torch.get_rng_state(), torch.emulated.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    assert not takes_storage_of(model, torch.device(NAME))
    audits.audit(model, recipe, device=NAME)
    assert seen, "the hook came along"
    assert all(g.device.type == NAME for g in seen)
    for name, parameter in model.named_parameters():
        same, value, address = before[name]
        assert parameter is same
        assert parameter.data_ptr() == address
        assert torch.equal(parameter, value)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert torch.equal(torch.emulated.get_rng_state(), state[1])
    assert bool((np.random.get_state()[1] == state[2]).all())
    assert random.getstate() == state[3]


def test_a_step_that_mixes_devices_is_reported_and_nothing_else() -> None:
    model = Small(matrices_only=False)
    batch = {"x": torch.randn(20, 8), "y": torch.randint(0, 4, (20,))}

    def step(m: Any, b: Any, context: Any) -> None:
        context.optimizer.zero_grad()
        loss(m, b).backward()
        with torch.no_grad():
            m.first.weight.mul_(0.9)  # half of what it was to do
            m.last.weight.add_(torch.ones(4, 12))

    recipe = audits.Recipe.capture(model, batch=batch, loss=loss, step=step,
                                   optimizer=torch.optim.SGD(model.parameters(), lr=0.1))  # fmt: skip
    report = audits.audit(model, recipe, device=NAME)
    assert [r.message for r in report.rows if r.outcome is audits.Outcome.FAIL] == []
    raised = [r for r in report.rows if r.cause == "step raised"]
    assert len(raised) == 1
    assert "training step 1 raised RuntimeError: Expected all tensors to be on the same device" in raised[0].message


def test_dropout_draws_on_the_device_and_is_played_back() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.5), nn.Linear(32, 4))
    batch = {"x": torch.randn(20, 8), "y": torch.randint(0, 4, (20,))}
    recipe = audits.Recipe.capture(model, batch=batch, loss=loss, optimizer=torch.optim.Adam(model.parameters()))
    with open_subject(model, recipe, device=NAME) as subject:
        subject.reset()
        first = subject.loss(subject.phases[0]).item()
        assert subject.loss(subject.phases[0]).item() != first, "the device's generator went on"
        subject.reset()
        assert subject.loss(subject.phases[0]).item() == first
    assert audits.audit(model, recipe, device=NAME).outcome is audits.Outcome.PASS
