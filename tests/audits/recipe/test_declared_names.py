"""A name in `stop_gradient` or `expect` that matches nothing is an error, at capture and at the audit."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from audits import Recipe, RecipeError, audit


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * 2


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.Linear(4, 2)
        self.alias = self.encoder
        self.tied = nn.Linear(4, 2)
        self.tied.weight = self.head.weight
        self.double = Double.apply

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.double(self.alias(x))
        return self.head(hidden) + self.tied(hidden)  # type: ignore[no-any-return]


BATCH = {"x": torch.randn(5, 3), "y": torch.tensor([0, 1, 0, 1, 1])}

WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"stop_gradient": ["encodr"]},
        r"stop_gradient names 'encodr', and the model has no such module; did you .*'encoder'",
    ),
    ({"stop_gradient": ["encoder.*"]}, r"takes paths of modules and no globs; did you mean 'encoder"),
    ({"stop_gradient": ["alias"]}, "which is the module 'encoder'"),
    ({"expect": {"frozen": ["nosuch.*"]}}, r"expect\['frozen'\]: 'nosuch\.\*' matches no parameter"),
    ({"expect": {"frozen": "encodr.*"}}, "did you mean 'encoder'"),
    ({"expect": {"trainable": ["tied.weight"]}}, "is tied to 'head.weight'"),
    ({"expect": {"shared": ["had.*"]}}, "did you mean 'head'"),
    ({"expect": {"writes_outside_step": ["had.*"]}}, "writes_outside_step"),
    ({"expect": {"weight_decay": {"*.gamma": 0.0, "*": 0.1}}}, r"expect\['weight_decay'\]: '\*\.gamma' matches no"),
    ({"expect": {"lr": {"step": {"bodi.*": 0.1}}}}, r"expect\['lr'\]\['step'\]: 'bodi\.\*'"),
    ({"expect": {"optimizer": {"generator": "SGD"}}}, "phase 'generator', which is not there"),
    ({"expect": {"ema": {"shadow": {"source": "encoder", "decay": 0.9}}}}, "names 'shadow', under which"),
    ({"expect": {"ema": {"encoder": {"source": "onlin", "decay": 0.9}}}}, r"\['source'\] names 'onlin'"),
    ({"expect": {"ema": "encoder"}}, r"maps a shadow to what it follows, .*; it is 'encoder'"),
    ({"expect": {"ema": {"encoder.*": 0.99}}}, r"'source': 'student', 'decay': 0.99.*; for 'encoder\.\*' it has 0.99"),
    ({"expect": {"ema": {"encoder": {"decay": 0.9}}}}, r"for 'encoder' it has \{'decay': 0.9\}"),
    ({"expect": {"ema": {"encoder": {"source": "head", "decay": 1.5}}}}, "is 1.5: it is a number from 0 to 1"),
    ({"expect": {"ema": {"encoder": {"source": "head", "buffers": "moved"}}}}, "is 'moved': it is one of copied"),
    ({"expect": {"ema": {"encoder": {"source": "head", "when": "later"}}}}, "is 'later': it is one of after, before"),
    ({"expect": {"ema": {"encoder": {"source": "head", "momentum": 0.9}}}}, "for 'encoder' it has 'momentum'"),
]

RIGHT: list[dict[str, Any]] = [
    {"stop_gradient": ["encoder.0", "loss", ""]},
    {"expect": {"frozen": ["encoder.*"], "trainable": "head.*", "shared": ["*"], "writes_outside_step": True}},
    {"expect": {"weight_decay": {"*.bias": 0.0, "*": 0.1}, "lr": {"step": 0.1}, "optimizer": {"step": "SGD"}}},
    {"expect": {"ema": {"tied": {"source": "head", "decay": 0.9}}, "custom_gradient": ["Double", "encoder"]}},
]


def captured(model: nn.Module, **declared: Any) -> Recipe:
    return Recipe.capture(
        model, batch=BATCH, loss="cross_entropy", optimizer=torch.optim.SGD(model.parameters(), lr=0.1), **declared
    )


@pytest.mark.parametrize(("declared", "text"), WRONG)
def test_a_name_that_matches_nothing_is_refused_at_capture_and_at_the_audit(
    declared: dict[str, Any], text: str
) -> None:
    model = Model()
    with pytest.raises(RecipeError, match=text):
        captured(model, **declared)
    fields = {key: tuple(value) if key == "stop_gradient" else value for key, value in declared.items()}
    with pytest.raises(RecipeError, match=text):
        audit(model, dataclasses.replace(captured(model), **fields), device="cpu")


@pytest.mark.parametrize("declared", RIGHT)
def test_names_that_are_there_are_taken(declared: dict[str, Any]) -> None:
    model = Model()
    assert audit(model, captured(model, **declared), device="cpu").rows


def test_a_function_that_no_loss_applies_is_refused_at_the_audit() -> None:
    model = Model()
    with pytest.raises(RecipeError, match=r"custom_gradient'\] names 'Doubl'.*did you mean 'Double'"):
        audit(model, captured(model, expect={"custom_gradient": ["Doubl"]}), device="cpu")
