"""Muon on gradients of low rank, as a batch smaller than the layer or a head of few classes gives them.

Newton-Schulz lifts what bfloat16 rounds there as high as the update: only the same roundings tell right from wrong.
"""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_optimizer
import torch
import torch.optim._muon
from torch import nn
from torch.nn import functional as F

from audits import Outcome
from tests.audits.updates.subjects import audited, failed, of

ROWS = 12

#: Widths of two layers: a head of two or three classes, and layers wider than the batch is long.
LAYERS = [(6, 12, 3), (6, 12, 2), (30, 64, 5)]

OPTIONS: list[dict[str, Any]] = [{}, {"weight_decay": 0.0}, {"adjust_lr_fn": "match_rms_adamw"}, {"nesterov": False}]


def classify(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def rows_of(layers: tuple[int, int, int], make: Any, *, steps: int = 0, seed: int = 0, **recipe: Any) -> Any:
    torch.manual_seed(seed)
    wide, inner, classes = layers
    model = nn.Sequential(nn.Linear(wide, inner, bias=False), nn.GELU(), nn.Linear(inner, classes, bias=False))
    batch = {"x": torch.randn(ROWS, wide), "y": torch.arange(ROWS) % classes}
    optimizer = make(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        classify(model, batch).backward()
        optimizer.step()
    return audited(model, batch=batch, loss=classify, optimizer=optimizer, **recipe)


def held(rows: Any) -> None:
    assert failed(rows) == []
    judged = of(rows, "update.rule")
    assert len(judged) == 4
    assert {row.outcome for row in judged} == {Outcome.PASS}


@pytest.mark.sampled(cases=8)
@pytest.mark.parametrize("seed", [0, 1, 4])
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("layers", LAYERS, ids=str)
def test_torchs_muon_is_held_to_its_rule(layers: Any, options: dict[str, Any], steps: int, seed: int) -> None:
    held(rows_of(layers, lambda p: torch.optim.Muon(p, lr=1e-2, **options), steps=steps, seed=seed))


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"use_adjusted_lr": True, "nesterov": False}], ids=str)
@pytest.mark.parametrize("layers", LAYERS, ids=str)
def test_a_packages_muon_is_held_to_its_rule(layers: Any, options: dict[str, Any]) -> None:
    held(rows_of(layers, lambda p: pytorch_optimizer.Muon([{"params": list(p), "use_muon": True}], **options), steps=2))


class SingleDeviceMuon(torch.optim.Optimizer):
    """Its author's: products apart, the scale rounded with the matrix."""

    def __init__(self, parameters: Any, lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(state["momentum_buffer"], group["momentum"]).bfloat16()
                tall = x.size(0) > x.size(1)
                x = x.mT if tall else x
                x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
                for _ in range(5):
                    gram = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
                x = x.mT if tall else x
                x *= max(1, p.size(0) / p.size(1)) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(x, alpha=-group["lr"])


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("layers", LAYERS, ids=str)
def test_its_authors_muon_is_held_to_its_rule(layers: Any, steps: int) -> None:
    held(rows_of(layers, SingleDeviceMuon, steps=steps))


WRONG = {
    "a step less": lambda right, g, c, n, eps: right(g, c, n - 1, eps),
    "another coefficient": lambda right, g, c, n, eps: right(g, (c[0], c[1], 1.02 * c[2]), n, eps),
    "a factor": lambda right, g, c, n, eps: 1.2 * right(g, c, n, eps),
    "no orthogonalisation": lambda right, g, c, n, eps: g / g.norm(),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("layers", LAYERS, ids=str)
def test_a_wrong_iteration_does_not_pass(layers: Any, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch.optim._muon._zeropower_via_newtonschulz
    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", lambda *a: WRONG[wrong](right, *a))
    rows = rows_of(layers, lambda p: torch.optim.Muon(p, lr=1e-2))
    assert Outcome.PASS not in {row.outcome for row in of(rows, "update.rule")}
    assert {check for check, _ in failed(rows)} <= {"update.rule", "optimizer.probe"}
    assert any(row.outcome is Outcome.FAIL for row in of(rows, "optimizer.probe"))


class MuonWithAuxAdam(torch.optim.Optimizer):
    """The group that AdamW steps, as the author's code has it, without any of Muon's options; wrong: uncorrected."""

    def __init__(self, parameters: Any) -> None:
        own = {"use_muon": False, "lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.0}
        super().__init__([{"params": list(parameters), **own}], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            if not state:
                state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            state["step"] += 1
            state["exp_avg"].lerp_(p.grad, 0.1)
            state["exp_avg_sq"].lerp_(p.grad.square(), 0.05)
            p.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt() + 1e-10, value=-1e-2)


def test_a_wrong_adam_beside_muon_fails() -> None:
    rows = rows_of((6, 12, 3), MuonWithAuxAdam)
    assert {check for check, _ in failed(rows)} >= {"update.rule"}
