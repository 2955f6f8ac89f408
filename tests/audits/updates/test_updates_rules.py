"""The reference rules against hand-worked values and against torch.optim itself, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from audits.updates.rules import RULES
from audits.updates.rules.lbfgs import Memory, lbfgs_step

#: Every option of every class, beside the defaults.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "SGD": [{"lr": 0.1}, {"lr": 0.1, "momentum": 0.9, "dampening": 0.2},
            {"lr": 0.1, "weight_decay": 0.1, "maximize": True},
            {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}],
    "Adam": [{}, {"weight_decay": 0.1, "amsgrad": True}, {"maximize": True, "eps": 1e-3},
             {"decoupled_weight_decay": True, "weight_decay": 0.1, "betas": (0.5, 0.7)}],
    "AdamW": [{}, {"weight_decay": 0.3, "amsgrad": True, "maximize": True}],
    "NAdam": [{}, {"weight_decay": 0.1, "momentum_decay": 0.1}, {"decoupled_weight_decay": True, "weight_decay": 0.1},
              {"maximize": True}],
    "RAdam": [{}, {"weight_decay": 0.1, "betas": (0.8, 0.9)}, {"decoupled_weight_decay": True, "weight_decay": 0.1},
              {"maximize": True}],
    "Adamax": [{}, {"weight_decay": 0.1, "maximize": True, "eps": 1e-2}],
    "Adagrad": [{}, {"lr_decay": 0.2, "weight_decay": 0.1, "initial_accumulator_value": 0.3}, {"maximize": True}],
    "Adadelta": [{}, {"rho": 0.7, "weight_decay": 0.1, "maximize": True}],
    "RMSprop": [{}, {"centered": True, "momentum": 0.8}, {"weight_decay": 0.1, "alpha": 0.7, "maximize": True}],
    "Rprop": [{}, {"etas": (0.3, 1.5), "step_sizes": (1e-3, 0.02), "maximize": True}],
    "ASGD": [{}, {"lr": 0.3, "lambd": 0.1, "alpha": 0.5, "t0": 2, "weight_decay": 0.1}, {"maximize": True}],
    "Adafactor": [{}, {"weight_decay": 0.1, "eps": (1e-4, 0.1), "d": 1.5, "beta2_decay": -0.5}, {"maximize": True}],
    "Muon": [{}, {"nesterov": False, "weight_decay": 0.0}, {"adjust_lr_fn": "match_rms_adamw", "momentum": 0.5}],
    "SparseAdam": [{}, {"betas": (0.5, 0.7), "maximize": True}],
}  # fmt: skip

CASES = [(name, options) for name, several in OPTIONS.items() for options in several]


def test_every_optimizer_that_torch_exports_has_a_rule() -> None:
    exported = {
        name
        for name in torch.optim.__all__
        if isinstance(found := getattr(torch.optim, name), type) and issubclass(found, torch.optim.Optimizer)
    } - {"Optimizer"}
    assert exported == set(RULES) | {"LBFGS"}
    assert set(OPTIONS) == set(RULES)


def test_every_option_of_every_class_is_exercised() -> None:
    import inspect

    #: Choices of implementation, not of the rule.
    implementation = {"foreach", "fused", "capturable", "differentiable", "params", "self", "lr", "ns_coefficients",
                      "ns_steps"}  # fmt: skip
    for name, several in OPTIONS.items():
        accepted = set(inspect.signature(getattr(torch.optim, name).__init__).parameters) - implementation
        tried = {key for options in several for key in options}
        left = {key for key in accepted - tried if key not in ("betas", "eps", "momentum")}
        assert not left, (name, left)


@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda value: str(value))
def test_rule_agrees_with_torch_in_float64(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    shape = (6, 4)
    parameter = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    optimizer = getattr(torch.optim, name)([parameter], **options)
    chosen = {**optimizer.defaults, **options, "dtype": torch.float64}
    state: dict[str, Any] = {}
    for scale in (1.0, -0.5, 0.0, 100.0, 1e-3, 1.0, 1.0, 1e-3, 0.3):
        gradient = torch.randn(shape, dtype=torch.float64) * scale
        if name == "SparseAdam":
            rows = torch.tensor([[0, 2, 5]])
            gradient = torch.sparse_coo_tensor(rows, gradient[rows[0]], shape, check_invariants=False).coalesce()
        before = parameter.detach().clone()
        expected = RULES[name].update(before, gradient.clone(), state, chosen)
        parameter.grad = gradient.clone()
        optimizer.step()
        actual = parameter.detach() - before
        # torch's scalars in float32 (NAdam, ASGD); Newton-Schulz in bfloat16 (Muon)
        tolerance = {"Muon": 0.12, "NAdam": 1e-6, "ASGD": 1e-6}.get(name, 1e-12)
        assert float((actual - expected).norm()) <= tolerance * float(expected.norm()) + 1e-15


def test_first_steps_by_hand() -> None:
    theta, gradient = torch.tensor([2.0], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    sgd = RULES["SGD"].update(theta, gradient, {}, {"lr": 0.1, "weight_decay": 0.01, "momentum": 0.9, "dampening": 0.5})
    assert sgd.item() == pytest.approx(-0.1 * (0.5 + 0.02))
    adam = RULES["Adam"].update(theta, gradient, {}, {"lr": 0.1, "betas": (0.9, 0.99), "eps": 0.25})
    assert adam.item() == pytest.approx(-0.1 * 0.5 / (0.5 + 0.25))
    adamw = RULES["AdamW"].update(
        theta, gradient, {}, {"lr": 0.1, "betas": (0.9, 0.99), "eps": 0.0, "weight_decay": 0.3}
    )
    assert adamw.item() == pytest.approx(-0.1 - 0.1 * 0.3 * 2.0)
    adagrad = RULES["Adagrad"].update(theta, gradient, {}, {"lr": 0.1, "eps": 0.0, "initial_accumulator_value": 0.75})
    assert adagrad.item() == pytest.approx(-0.1 * 0.5 / 1.0)
    state = {
        "step": 1.0,
        "prev": torch.tensor([-1.0], dtype=torch.float64),
        "step_size": torch.tensor([0.2], dtype=torch.float64),
    }
    rprop = RULES["Rprop"].update(theta, gradient, state, {"lr": 0.1, "etas": (0.5, 1.2), "step_sizes": (1e-6, 50)})
    assert rprop.item() == 0.0
    assert state["step_size"].item() == pytest.approx(0.1)


@pytest.mark.parametrize(
    "options",
    [{}, {"lr": 0.3, "max_iter": 4}, {"line_search_fn": "strong_wolfe"},
     {"line_search_fn": "strong_wolfe", "history_size": 2},
     {"max_eval": 3}, {"tolerance_grad": 1e-2}],
    ids=str,
)  # fmt: skip
def test_lbfgs_agrees_with_torch_in_float64(options: dict[str, Any]) -> None:
    torch.manual_seed(2)
    basis = torch.randn(9, 9, dtype=torch.float64)
    matrix = basis @ basis.T + torch.eye(9, dtype=torch.float64)

    def value(x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x @ matrix @ x + (x**4).sum() - x.sum()

    def evaluate(x: torch.Tensor) -> tuple[float, torch.Tensor]:
        x = x.clone().requires_grad_(True)
        loss = value(x)
        return float(loss.detach()), torch.autograd.grad(loss, x)[0]

    parameter = nn.Parameter(torch.randn(9, dtype=torch.float64))
    optimizer = torch.optim.LBFGS([parameter], **options)
    memory = Memory.of({})

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = value(parameter)
        loss.backward()
        return loss

    for _ in range(4):
        before = parameter.detach().clone()
        expected = lbfgs_step(before, evaluate, memory, optimizer.param_groups[0])
        optimizer.step(closure)
        moved = float((expected - before).norm())
        assert float((parameter.detach() - expected).norm()) <= 1e-10 * moved + 1e-11
    captured = Memory.of(optimizer.state[parameter])
    assert captured.iterations == memory.iterations
    assert math.isclose(captured.length, memory.length, rel_tol=1e-6)
