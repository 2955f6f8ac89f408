"""A subject is the recipe made live, and leaves the model as it was, bit for bit."""

from __future__ import annotations

import random
import signal
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from audits import Recipe, RecipeError, audit
from audits.live.state import borrowed
from audits.live.subject import open_subject
from audits.random_state import RandomState

BATCH = {"inputs": torch.randn(6, 3), "targets": torch.randn(6, 2)}


class Busy(nn.Module):
    """A module whose forward changes everything a forward can change."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(3, 2)
        self.calls = 0
        self.seen: list[int] = []
        self.register_buffer("counter", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.seen.append(self.calls)
        self.counter += 1
        self.last = x.sum()
        return self.out(self.drop(self.norm(self.linear(x))))  # type: ignore[no-any-return]


def recipe_of(model: nn.Module, **options: Any) -> Recipe:
    options = {"batch": BATCH, "loss": "mse_loss", "optimizer": torch.optim.Adam(model.parameters()), **options}
    return Recipe.capture(model, **options)


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "ids": {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()},
        "grads": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "plain": (model.calls, list(model.seen), hasattr(model, "last")),
        "rng": (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()),
    }


@pytest.mark.parametrize("training", [True, False])
def test_an_audit_leaves_everything_as_it_was(training: bool) -> None:
    model = Busy()
    optimizer = torch.optim.Adam(model.parameters())
    recipe = recipe_of(model, optimizer=optimizer)
    model.linear.weight.grad = torch.ones(3, 3)
    model.train(training)
    model.norm.eval()
    before = snapshot(model)
    audit(model, recipe)
    after = snapshot(model)
    for name, tensor in before["state"].items():
        assert torch.equal(tensor, after["state"][name]), name
    for key in ("ids", "modes", "plain"):
        assert before[key] == after[key], key
    assert torch.equal(before["rng"][0], after["rng"][0])
    assert before["rng"][1:] == after["rng"][1:]
    assert torch.equal(after["grads"]["linear.weight"], torch.ones(3, 3))
    assert after["grads"]["out.weight"] is None
    assert not optimizer.state, "the user's optimizer is never touched"


def test_a_crash_inside_leaves_everything_as_it_was() -> None:
    model = Busy()
    before = snapshot(model)

    def crash() -> None:
        with open_subject(model, recipe_of(model), device="cpu") as subject:
            subject.loss(subject.phases[0]).backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        crash()
    after = snapshot(model)
    assert all(torch.equal(before["state"][name], after["state"][name]) for name in before["state"])
    assert after["grads"]["linear.weight"] is None
    assert before["plain"] == after["plain"]


@pytest.mark.parametrize("ending", [None, ZeroDivisionError])
def test_an_interrupt_while_the_model_is_put_back_waits(
    ending: type[Exception] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Busy()
    before = snapshot(model)
    restore = RandomState.restore

    def interrupted(state: RandomState) -> None:
        signal.raise_signal(signal.SIGINT)
        restore(state)

    def crash() -> None:
        with borrowed(model, torch.device("cpu")):
            model(BATCH["inputs"]).sum().backward()
            monkeypatch.setattr(RandomState, "restore", interrupted)
            if ending is not None:
                raise ending

    with pytest.raises(KeyboardInterrupt):
        crash()
    after = snapshot(model)
    assert all(torch.equal(before["state"][name], after["state"][name]) for name in before["state"])
    for key in ("ids", "modes", "plain"):
        assert before[key] == after[key], key
    assert torch.equal(before["rng"][0], after["rng"][0])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_reset_repeats_an_evaluation_exactly() -> None:
    model = Busy()
    with open_subject(model, recipe_of(model), device="cpu") as subject:
        subject.reset()
        first = subject.loss(subject.phases[0]).item()
        subject.loss(subject.phases[0])
        subject.reset()
        assert subject.loss(subject.phases[0]).item() == first


def test_accumulation_is_the_mean_of_equal_micro_batches() -> None:
    model = nn.Linear(3, 2)
    with open_subject(model, recipe_of(model, accumulate=3), device="cpu") as subject:
        phase = subject.phases[0]
        assert [weight for weight, _ in subject.micro_batches(phase)] == pytest.approx([1 / 3] * 3)
        whole = nn.functional.mse_loss(model(BATCH["inputs"]), BATCH["targets"])
        assert subject.loss(phase).item() == pytest.approx(whole.item(), rel=1e-6)


def test_tokens_weigh_unequal_micro_batches() -> None:
    model = nn.Embedding(7, 7)
    labels = torch.randint(0, 7, (2, 5))
    labels[1, 2:] = -100
    batches = [{"inputs": torch.ones(1, 5, dtype=torch.long), "targets": labels[i : i + 1]} for i in range(2)]

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch["inputs"]).flatten(0, 1), batch["targets"].flatten())

    recipe = recipe_of(model, batch=batches, loss=loss, normalize="tokens:targets")
    with open_subject(model, recipe, device="cpu") as subject:
        assert [weight for weight, _ in subject.micro_batches(subject.phases[0])] == pytest.approx([5 / 7, 2 / 7])
        together = loss(model, {"inputs": torch.ones(2, 5, dtype=torch.long), "targets": labels})
        assert subject.loss(subject.phases[0]).item() == pytest.approx(together.item(), rel=1e-6)


def test_frozen_flags_of_the_recipe_are_set_on_a_model_that_forgot_them() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    recipe = recipe_of(model, optimizer=torch.optim.SGD(model[1].parameters(), lr=0.1))
    rebuilt = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    with open_subject(rebuilt, recipe, device="cpu") as subject:
        assert subject.trainable == ("1.weight", "1.bias")
    assert rebuilt[0].weight.requires_grad, "given back as it was"


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (lambda model, batch: model(batch["inputs"]), "must return one number, not a tensor of shape"),
        (lambda model, batch: 1.0, "must return one number, not float"),
        (lambda model, batch: torch.ones(()), "depends on no trainable parameter"),
        (lambda model, batch: model(batch["inputs"][:, :1]).sum(), "raised RuntimeError"),
        (lambda model, batch: batch["nothing"], "raised KeyError"),
    ],
)
def test_a_loss_that_cannot_work_is_refused_with_its_cause(loss: Any, text: str) -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(RecipeError, match=text):
        audit(model, recipe_of(model, loss=loss))


def test_an_absent_parameter_is_named_with_the_nearest() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    with pytest.raises(RecipeError, match=r"'0\.weight', which the model does not have"):
        audit(nn.Linear(3, 2), recipe_of(model))


def test_another_shape_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"shape \(4, 3\), the recipe says \(2, 3\)"):
        audit(nn.Linear(3, 4), recipe_of(nn.Linear(3, 2)))


def test_a_lambda_works_in_process() -> None:
    model = nn.Linear(3, 2)
    report = audit(model, recipe_of(model, loss=lambda m, b: nn.functional.mse_loss(m(b["inputs"]), b["targets"])))
    assert report.outcome == "pass"
    assert report.coverage == 1.0
