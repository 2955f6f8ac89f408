"""The error measure, what it resolves, and the diagnosis of an update that its rule does not explain."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from audits.outcomes import Lane, Outcome
from audits.updates.compare import deviation, judge, resolution
from audits.updates.judge.other_rules import explain
from audits.updates.rules import RULES
from tests.audits.updates.subjects import audited, of
from tests.wrong_on_purpose.updates import models

ADAMW = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def _update(
    options: dict[str, object], theta: torch.Tensor, gradient: torch.Tensor, rule: str = "AdamW"
) -> torch.Tensor:
    return RULES[rule].update(theta, gradient, {}, options)


@pytest.fixture
def tensors() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(300, dtype=torch.float64, generator=generator),
            torch.randn(300, dtype=torch.float64, generator=generator) * 1e-2)  # fmt: skip


@given(st.floats(0.01, 100.0), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_rounding_the_weights_once_is_within_half_an_eps(scale: float, dtype: torch.dtype) -> None:
    theta = torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(dtype).double() * scale
    theta = theta.to(dtype).double()
    update = torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) * scale
    after = (theta + update).to(dtype).double()
    found = deviation(after - theta, update, theta, dtype)
    assert found.l2 <= 0.51
    assert judge(found, RULES["SGD"], dtype, {}).met


def test_one_wrong_element_of_many_is_seen(tensors: tuple[torch.Tensor, torch.Tensor]) -> None:
    theta, gradient = tensors
    expected = _update(ADAMW, theta, gradient)
    actual = expected.clone()
    actual[17] = 0.0
    assert not judge(deviation(actual, expected, theta, torch.float32), RULES["AdamW"], torch.float32, ADAMW).met


def test_infinite_and_missing_values_never_pass(tensors: tuple[torch.Tensor, torch.Tensor]) -> None:
    theta, gradient = tensors
    expected = _update(ADAMW, theta, gradient)
    for bad in (math.inf, math.nan):
        actual = expected.clone()
        actual[5] = bad
        assert not judge(deviation(actual, expected, theta, torch.float32), RULES["AdamW"], torch.float32, ADAMW).met


def test_resolution_is_the_smallest_error_that_shows(tensors: tuple[torch.Tensor, torch.Tensor]) -> None:
    limit = resolution(RULES["AdamW"], torch.float32, ADAMW, theta=1.0, full=1e-3, term=1e-3)
    assert limit == pytest.approx(4 * 2**-23 * 1.001 / 1e-3, rel=1e-6)
    assert resolution(RULES["AdamW"], torch.float32, ADAMW, 1.0, 0.0, 0.0) == math.inf


@pytest.mark.parametrize(
    ("planted", "words"),
    [
        ({"weight_decay": 0.0}, "without weight decay"),
        ({"lr": 2e-3}, "2 times"),
        ({"weight_decay": 0.02}, "applied 2 times"),
        ({"betas": (0.999, 0.9)}, ""),
    ],
)
def test_diagnosis_names_the_alternative(
    planted: dict[str, object], words: str, tensors: tuple[torch.Tensor, torch.Tensor]
) -> None:
    theta, gradient = tensors
    state = {"step": 3.0, "exp_avg": gradient.flip(0), "exp_avg_sq": gradient.square() * 2}
    actual = RULES["AdamW"].update(theta, gradient, dict(state), {**ADAMW, **planted})
    assert words in explain(RULES["AdamW"], theta, gradient, state, ADAMW, actual, torch.float64)
    coupled = RULES["Adam"].update(theta, gradient, dict(state), ADAMW)
    assert "coupled" in explain(RULES["AdamW"], theta, gradient, state, ADAMW, coupled, torch.float64)
    assert "opposite sign" in explain(RULES["SGD"], theta, gradient, {}, {"lr": 0.1}, 0.1 * gradient, torch.float64)
    assert "no update" in explain(RULES["SGD"], theta, gradient, {}, {"lr": 0.1}, 0.0 * gradient, torch.float64)


def test_what_float32_cannot_resolve_is_resolved_in_float64_or_said_to_be_open() -> None:
    model, batch = models.mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9)
    rows = audited(model, batch=batch, loss=models.classify, optimizer=optimizer)
    assert {r.lane for r in of(rows, "update.rule", "first.weight")} == {Lane.FLOAT64}
    assert {r.outcome for r in of(rows, "update.rule")} == {Outcome.PASS}
    assert {r.outcome for r in of(rows, "update.lost-to-rounding", "first.weight")} == {Outcome.WARN}


def test_bfloat16_is_judged_on_wider_copies() -> None:
    model, batch = models.gpt()
    rows = audited(
        model.bfloat16(), batch=batch, loss=models.next_token, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)
    )
    assert {r.lane for r in of(rows, "update.rule")} == {Lane.FLOAT32}
    assert all(r.detection_limit is not None and r.detection_limit <= 1e-2 for r in of(rows, "update.rule"))
