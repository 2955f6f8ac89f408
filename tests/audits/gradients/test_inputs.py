"""Input gradients: only what somebody asks for can fail; an absent one that nobody wants is a note."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from audits.errors import RecipeError
from audits.outcomes import Outcome, ResultRow, Severity
from tests.audits.gradients.cases import INPUT, Activation, ScaledSwish, audit, classes, net, outcomes


def inputs(model: nn.Module, batch: Any, loss: Any = "cross_entropy", **options: Any) -> dict[str, ResultRow]:
    return {str(row.parameter): row for row in audit(model, batch, loss, checks=(INPUT,), **options)}


def marked(batch: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return batch | {name: batch[name].clone().requires_grad_()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wrong_gradient_fails_where_it_is_asked_for_and_warns_elsewhere(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batch = classes() | {"x": torch.randn(16, 8, dtype=dtype)}
    right, bug = net(nn.Tanh()).to(dtype), net(Activation(ScaledSwish)).to(dtype)
    for expect, given in (({}, batch), ({"input_gradients": ["x"]}, batch), ({}, marked(batch, "x"))):
        assert inputs(right, given, expect=expect)["<batch x>"].outcome is Outcome.PASS
        found = inputs(bug, given, expect=expect)["<batch x>"]
        asked = bool(expect) or given is not batch
        assert found.outcome is (Outcome.FAIL if asked else Outcome.WARN)
        assert found.severity is (Severity.FAIL if asked else Severity.WARN)
        assert "ScaledSwish" in found.message
        assert ("input_gradients" in found.message) is not asked


@pytest.mark.parametrize("nothing", [True, False])
def test_a_fused_losss_targets_get_no_gradient_by_design(nothing: bool) -> None:
    class SoftCrossEntropy(torch.autograd.Function):
        """Cross-entropy with soft targets, which get None, or zeros."""

        @staticmethod
        def forward(ctx: Any, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(logits, target)
            return -(target * logits.log_softmax(-1)).sum(-1).mean()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            logits, target = ctx.saved_tensors
            by_logits = target.sum(-1, keepdim=True) * logits.softmax(-1) - target
            return gradient * by_logits / len(logits), None if nothing else torch.zeros_like(target)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return SoftCrossEntropy.apply(model(batch["x"]), batch["target"])

    torch.manual_seed(0)
    batch = {"x": torch.randn(16, 8), "target": torch.rand(16, 3)}
    rows = inputs(net(nn.Tanh()), batch, loss)
    assert rows["<batch x>"].outcome is Outcome.PASS
    assert rows["<batch target>"].outcome is Outcome.SKIPPED
    assert rows["<batch target>"].cause == "no gradient, and none asked for"
    assert "nothing needs doing" in rows["<batch target>"].message
    for options in ({"expect": {"input_gradients": ["tar*"]}}, {"batch": marked(batch, "target")}):
        asked = inputs(net(nn.Tanh()), options.pop("batch", batch), loss, **options)
        assert asked["<batch target>"].outcome is Outcome.FAIL


def test_preprocessing_without_gradient_is_a_note_unless_it_is_asked_for() -> None:
    class Normalising(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return (x - x.mean()) / x.std()

    torch.manual_seed(0)
    model, batch = nn.Sequential(Normalising(), net(nn.Tanh())), classes()
    assert inputs(model, batch)["<batch x>"].outcome is Outcome.SKIPPED
    assert inputs(model, marked(batch, "x"))["<batch x>"].outcome is Outcome.FAIL
    large = audit(net(nn.Tanh()), batch, checks=(INPUT,), input_gradient_limit=10)
    assert [row.outcome for row in large] == [Outcome.SKIPPED]


def test_a_name_that_no_floating_tensor_has_is_refused() -> None:
    for name in ("images", "y"):  # y holds integers
        with pytest.raises(RecipeError, match=r"input_gradients.*no such floating tensor"):
            audit(net(nn.Tanh()), classes(), expect={"input_gradients": [name]})


class Careless(torch.autograd.Function):
    """Doubles; its backward reads the gradient's memory as if it were contiguous, as a kernel by pointer does."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        wide = torch.empty(gradient.shape).stride()
        room = gradient.untyped_storage().nbytes() // gradient.element_size() - gradient.storage_offset()
        if room < gradient.numel():
            return 2 * gradient.as_strided((1,), (1,)).expand(gradient.shape) * 1.5
        return 2 * gradient.as_strided(gradient.shape, wide)


class Careful(Careless):
    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return Careless.backward(ctx, gradient.contiguous())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("after", ["cat", "sum"])
def test_a_function_that_is_wrong_for_a_strided_gradient_is_named(after: str, dtype: torch.dtype) -> None:
    class Joined(nn.Module):
        def __init__(self, function: type[torch.autograd.Function]) -> None:
            super().__init__()
            self.first, self.last, self.act = nn.Linear(8, 6), nn.Linear(12, 3), Activation(function)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.first(x)
            if after == "cat":
                return self.last(torch.cat([h, self.act(h)], 1))
            return self.last(torch.cat([h, h.sin()], 1)) + self.act(h).sum()

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return F.mse_loss(model(batch["x"]), F.one_hot(batch["y"], 3).to(batch["x"].dtype))

    torch.manual_seed(0)
    batch = classes() | {"x": torch.randn(16, 8, dtype=dtype)}
    rows = audit(Joined(Careful).to(dtype), batch, loss, method="probe")
    assert set(outcomes(rows).values()) == {Outcome.PASS}
    rows = [
        row for row in audit(Joined(Careless).to(dtype), batch, loss, method="probe") if row.outcome is Outcome.FAIL
    ]
    assert {row.parameter for row in rows} == {"first.weight", "first.bias"}
    assert {row.cause for row in rows} == {"wrong backward of Careless in Activation (act)"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_may_refuse_inputs_that_ask_for_a_gradient(dtype: torch.dtype) -> None:
    """Audio models set ``requires_grad`` on their input's view for gradient checkpointing, which leaves alone allow."""

    class Refusing(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inner = x[:, None]
            inner.requires_grad = True
            return super().forward(inner)[:, 0]

    torch.manual_seed(0)
    batch = classes() | {"x": torch.randn(16, 8, dtype=dtype)}
    (row,) = inputs(Refusing(8, 3).to(dtype), batch).values()
    assert row.outcome is Outcome.SKIPPED
    assert "Nothing in the step uses it" in row.message
    (asked,) = inputs(Refusing(8, 3).to(dtype), batch, expect={"input_gradients": ["x"]}).values()
    assert asked.outcome is Outcome.INCONCLUSIVE
