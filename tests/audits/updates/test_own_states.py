"""Where an optimizer keeps what its rule goes on from: in its group, under no tensor, from its constructor."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from audits.outcomes import Outcome, ResultRow
from tests.audits.updates.subjects import audited, failed, of
from tests.wrong_on_purpose.updates import models
from tests.wrong_on_purpose.updates.faults_subclasses import MyAdamW, MyRMSprop


class Counting(torch.optim.Optimizer):
    """AdamW that counts in its group."""

    wrong = False

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            t = group["step"] = group.get("step", 0) + 1
            b1, b2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                m = state["m"] = b1 * state.get("m", torch.zeros_like(p)) + (1 - b1) * p.grad
                v = state["v"] = b2 * state.get("v", torch.zeros_like(p)) + (1 - b2) * p.grad**2
                p.mul_(1 - group["lr"] * group["weight_decay"])
                t = 1 if self.wrong else t
                p.sub_(group["lr"] * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + group["eps"]))


Counting.__name__ = "AdamW"


class MyAdagrad(torch.optim.Adagrad):
    """Adagrad as a loop of one's own, on the sums that its constructor begins."""

    wrong = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["step"] = state["step"] + 1
                state["sum"].addcmul_(p.grad, p.grad)
                lr = group["lr"] if self.wrong else group["lr"] / (1 + (float(state["step"]) - 1) * group["lr_decay"])
                p.addcdiv_(p.grad, state["sum"].sqrt() + group["eps"], value=-lr)


def rows_of(cls: Any, dtype: torch.dtype, steps: int, *, wrong: bool, **options: Any) -> list[ResultRow]:
    model, batch = models.mlp()
    model, batch = model.to(dtype), {"x": batch["x"].to(dtype), "y": batch["y"]}
    chosen = type(cls.__name__, (cls,), {"wrong": wrong, "mistake": "eps under the root" if wrong else ""})
    optimizer = chosen(model.parameters(), **options)
    models.train(model, batch, models.classify, optimizer, steps)
    return audited(model, batch=batch, loss=models.classify, optimizer=optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize(
    ("cls", "options"),
    [(Counting, {"lr": 1e-2}), (MyAdagrad, {"lr": 0.1, "lr_decay": 0.1}), (MyRMSprop, {"lr": 1e-2, "eps": 1e-4})],
    ids=["count in the group", "begun by the constructor", "no count"],
)
def test_right_ones_pass_and_wrong_ones_fail(cls: Any, options: Any, steps: int, dtype: torch.dtype) -> None:
    right = rows_of(cls, dtype, steps, wrong=False, **options)
    assert failed(right) == []
    assert {row.outcome for check in ("update.rule", "optimizer.probe") for row in of(right, check)} == {Outcome.PASS}
    wrong = {check for check, _ in failed(rows_of(cls, dtype, steps, wrong=True, **options))}
    assert wrong & {"update.rule", "optimizer.probe"}


def test_a_checkpoint_that_cannot_be_loaded_warns_and_says_what_it_raises() -> None:
    (row,) = of(rows_of(MyAdamW, torch.float32, 0, wrong=False), "registration.state-round-trip")
    assert row.outcome is Outcome.WARN
    assert "cannot be resumed: saving and loading its state_dict raises KeyError: 'step'" in row.message
