"""Custom Functions judged by themselves: mistakes that the batch hides fail, Functions that are right never do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from audits.outcomes import Outcome, ResultRow
from tests.audits.gradients.cases import audit, classes, net

DTYPES = [torch.float32, torch.float64]


def found(rows: list[ResultRow]) -> list[ResultRow]:
    """The findings that no parameter's row has."""
    assert not [row for row in rows if row.parameter and row.outcome is Outcome.FAIL]
    return [row for row in rows if row.outcome is Outcome.FAIL]


def cast(batch: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}


class WeightedLoss(torch.autograd.Function):
    """Cross entropy with class weights."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        log_probabilities, own = logits.log_softmax(1), weight[target]
        ctx.save_for_backward(log_probabilities, weight, target)
        return -(own * log_probabilities.gather(1, target[:, None])[:, 0]).sum() / own.sum()

    @staticmethod
    def weights(weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return weight[target]

    @classmethod
    def slope(cls, ctx: Any, weights: torch.Tensor) -> torch.Tensor:
        log_probabilities, weight, target = ctx.saved_tensors
        slope = log_probabilities.exp()
        slope[torch.arange(len(target)), target] -= 1
        return slope * (weights / weight[target].sum())[:, None]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        _, weight, target = ctx.saved_tensors
        return gradient * WeightedLoss.slope(ctx, weight[target]), None, None


class FirstWeight(WeightedLoss):
    """Wrong: every sample gets the first class's weight."""

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        _, weight, target = ctx.saved_tensors
        return gradient * WeightedLoss.slope(ctx, weight[:1].expand(len(target))), None, None


class IgnoresIncoming(WeightedLoss):
    """Wrong: right only while nothing scales the loss."""

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        _, weight, target = ctx.saved_tensors
        return WeightedLoss.slope(ctx, weight[target]), None, None


class Classifier(nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.layers = net(nn.Tanh())
        self.register_buffer("weight", weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", ["buffer", "batch", "loss"])
@pytest.mark.parametrize("value", [1.0, 2.5, 1 / 3])
def test_a_fused_loss_that_uses_only_the_first_weight(value: float, place: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.full((3,), value, dtype=dtype)
    model = Classifier(weight if place == "buffer" else torch.rand(3, dtype=dtype)).to(dtype)
    batch = cast(classes(), dtype)
    if place == "batch":
        batch["weight"] = weight

    def with_function(function: type) -> Any:
        def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            # built anew, in the dtype of the logits: neither the batch nor the model holds it
            logits = model.layers(batch["x"])
            given = {"buffer": model.weight, "batch": batch.get("weight"), "loss": logits.new_full((3,), value)}
            return function.apply(logits, given[place], batch["y"])

        return loss

    assert not found(audit(model, batch, with_function(WeightedLoss), method="probe"))
    before = model.weight.clone()
    rows = found(audit(model, batch, with_function(FirstWeight), method="probe"))
    assert torch.equal(model.weight, before)
    assert len(rows) == 1
    assert rows[0].parameter is None
    assert rows[0].check == "gradient.finite-difference"
    assert rows[0].cause == "wrong backward of FirstWeight in the loss function"
    assert "argument 0" in rows[0].message
    assert {"buffer": "weight", "batch": "batch weight", "loss": "argument 1"}[place] in rows[0].message
    assert rows[0].error > rows[0].threshold
    assert "custom_gradient" in (rows[0].where_to_look or "")
    if place == "batch":
        assert torch.equal(batch["weight"], weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_backward_that_ignores_what_comes_in(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, batch = Classifier(torch.rand(3)).to(dtype), cast(classes(), dtype)
    loss = lambda m, b: IgnoresIncoming.apply(m.layers(b["x"]), m.weight, b["y"])  # noqa: E731
    rows = found(audit(model, batch, loss, method="probe"))
    assert [row.cause for row in rows] == ["wrong backward of IgnoresIncoming in the loss function"]
    declared = audit(model, batch, loss, method="probe", expect={"custom_gradient": ["IgnoresIncoming"]})
    assert not found(declared)
    narrowed = audit(model, batch, loss, method="probe", parameters=("*.weight",))
    assert all(row.parameter for row in narrowed)


class Flip(torch.autograd.Function):
    """Wrong: the backward forgets the flip, which a mean does not show."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.flip(0)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class RightFlip(Flip):
    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.flip(0)


class Apply(nn.Module):
    def __init__(self, function: type) -> None:
        super().__init__()
        self.function = function

    def forward(self, *arguments: Any) -> Any:
        return self.function.apply(*arguments)


def test_a_uniform_incoming_gradient_hides_nothing() -> None:
    torch.manual_seed(0)
    loss = lambda m, b: m(b["x"]).mean()  # noqa: E731
    for function, names in ((RightFlip, []), (Flip, ["wrong backward of Flip in Apply (3)"])):
        model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4), Apply(function))
        assert [row.cause for row in found(audit(model, classes(), loss, method="probe"))] == names


class Gate(torch.autograd.Function):
    """``x * exp(a)``, with one gate for every feature."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, a)
        return x * a.exp()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x, a = ctx.saved_tensors
        return gradient * a.exp(), (gradient * x * a.exp()).sum(0)


class FirstGate(Gate):
    """Wrong where the gates differ, and they start equal."""

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x, a = ctx.saved_tensors
        return gradient * a[0].exp(), (gradient * x * a.exp()).sum(0)


class Gated(nn.Module):
    def __init__(self, function: type) -> None:
        super().__init__()
        self.body, self.gate, self.head = nn.Linear(8, 6), nn.Parameter(torch.zeros(6)), nn.Linear(6, 3)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.function.apply(self.body(x), self.gate))


@pytest.mark.parametrize("dtype", DTYPES)
def test_initial_zeros_hide_nothing(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batch = cast(classes(), dtype)
    assert not found(audit(Gated(Gate).to(dtype), batch, method="probe"))
    model = Gated(FirstGate).to(dtype)
    rows = found(audit(model, batch, method="probe"))
    assert [row.cause for row in rows] == ["wrong backward of FirstGate in Gated"]
    assert "gate" in rows[0].message
    assert not bool(model.gate.detach().any())


def test_a_wrong_function_that_a_parameter_names_is_not_said_twice() -> None:
    from tests.audits.gradients.cases import Activation, ScaledSwish

    rows = audit(net(Activation(ScaledSwish)), classes(), method="probe")
    assert [row for row in rows if row.outcome is Outcome.FAIL]
    assert all(row.parameter for row in rows)


# What is right stays right: Functions that lean on what holds of their arguments.


class Through(torch.autograd.Function):
    """Passes the gradient, inside its range and beyond."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(-20, 20)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class Clipped(torch.autograd.Function):
    """Clips the gradient, by value and by norm, at more than the loss's own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        clipped = gradient.clamp(-0.2, 0.2)
        return clipped * min(1.0, 1.0 / (float(clipped.norm()) + 1e-12))


class Noisy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        kept = (torch.rand_like(x) > 0.3).to(x)
        ctx.save_for_backward(kept)
        return x * kept / 0.7

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * ctx.saved_tensors[0] / 0.7


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.factor = 1.5
        ctx.mark_dirty(x)
        return x.mul_(ctx.factor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * ctx.factor


class Normalised(torch.autograd.Function):
    """Layer norm that also returns its statistics, whose gradients it ignores."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, statistics: torch.Tensor) -> Any:
        mean, scale = x.mean(1, keepdim=True), (x.var(1, unbiased=False, keepdim=True) + 1e-5).rsqrt()
        ctx.save_for_backward((x - mean) * scale, scale, weight)
        statistics.lerp_(mean.mean(), 0.1)
        return (x - mean) * scale * weight, mean, scale

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, *ignored: Any) -> Any:
        y, scale, weight = ctx.saved_tensors
        g = gradient * weight
        back = scale * (g - g.mean(1, keepdim=True) - y * (g * y).mean(1, keepdim=True))
        return back, (gradient * y).sum(0), None


class Divergence(torch.autograd.Function):
    """``sum p log p`` of probabilities; its gradient stays in their plane."""

    @staticmethod
    def forward(ctx: Any, p: torch.Tensor) -> torch.Tensor:
        if not bool(((p.sum(1) - 1).abs() < 1e-6).all()) or bool((p <= 0).any()):
            raise ValueError("these are no probabilities")
        ctx.save_for_backward(p)
        return (p * p.log()).sum()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        log = ctx.saved_tensors[0].log()
        return gradient * (log - log.mean(1, keepdim=True))


class Padded(torch.autograd.Function):
    """Rows beyond the length are filled with what the loss never reads."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, length: int) -> torch.Tensor:
        ctx.length = length
        out = x.square()
        out[length:] = x[length:] * 7
        ctx.save_for_backward(x)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        back = gradient * 2 * ctx.saved_tensors[0]
        back[ctx.length :] = 0
        return back, None


class Masked(torch.autograd.Function):
    """Takes any mask that is not zero as one in its backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient * (ctx.saved_tensors[0] > 0), None


class Total(torch.autograd.Function):
    """Is given the weights and their sum."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight, total)
        return (x * weight[:, None]).sum() / weight.sum()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        weight, total = ctx.saved_tensors
        return (gradient * weight / total)[:, None].expand(-1, 3), None, None


class Focal(torch.autograd.Function):
    """Is given probabilities that its backward knows to follow the logits."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(p)
        return (logits * p).sum()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (p,) = ctx.saved_tensors
        logits = torch.logit(p)
        return gradient * (p + logits * p * (1 - p)), None


class Root(torch.autograd.Function):
    """The symmetric half of a quadratic form's gradient."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(a)
        return torch.tril(a) @ a.diagonal()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (a,) = ctx.saved_tensors
        with torch.enable_grad():
            leaf = a.detach().requires_grad_()
            (back,) = torch.autograd.grad(torch.tril(leaf) @ leaf.diagonal(), leaf, gradient)
        return (back + back.mT) / 2


class OnlyOnce(torch.autograd.Function):
    """Refuses anything but the tensor it knows."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        if not bool((x.detach().abs().sum(1) > 0).all()) or x.shape[1] != 3 or bool((x > 50).any()):
            raise RuntimeError("not for me")
        ctx.save_for_backward(x)
        return x.sinh()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * ctx.saved_tensors[0].cosh()


class Kinked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.relu()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * (ctx.saved_tensors[0] > 0)


def _normalised(m: nn.Module, b: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(Normalised.apply(m(b["x"]), m.scale, m.statistics)[0], b["y"])


def _total(m: nn.Module, b: dict[str, torch.Tensor]) -> torch.Tensor:
    return Total.apply(m(b["x"]), b["weight"], b["weight"].sum())


def _built(m: nn.Module, b: dict[str, torch.Tensor]) -> torch.Tensor:
    weight = torch.ones_like(b["x"][:, 0])
    return Total.apply(m(b["x"]), weight, weight.sum())


RIGHT = {
    "straight through inside its range": lambda m, b: F.cross_entropy(Through.apply(m(b["x"])), b["y"]),
    "clips more than there is": lambda m, b: F.cross_entropy(Clipped.apply(m(b["x"])), b["y"]),
    "noise inside": lambda m, b: F.cross_entropy(Noisy.apply(m(b["x"])), b["y"]),
    "in place": lambda m, b: F.cross_entropy(InPlace.apply(m(b["x"]) * 1.0), b["y"]),
    "statistics": _normalised,
    "probabilities": lambda m, b: Divergence.apply(m(b["x"]).softmax(1)),
    "padding": lambda m, b: Padded.apply(m(b["x"]), 9)[:9].mean(),
    "a mask of ones": lambda m, b: F.cross_entropy(Masked.apply(m(b["x"]), b["keep"]), b["y"]),
    "a mask of ones, built": lambda m, b: F.cross_entropy(Masked.apply(m(b["x"]), torch.ones_like(b["keep"])), b["y"]),
    "a mask by name": lambda m, b: F.cross_entropy(Masked.apply(m(b["x"]), b["mask"]), b["y"]),
    "weights and their sum": _total,
    "weights and their sum, built": _built,
    "a number that follows": lambda m, b: (lambda z: Focal.apply(z, z.detach().sigmoid()))(m(b["x"])),
    "a symmetric matrix": lambda m, b: (lambda z: Root.apply(z.mT @ z + torch.eye(3).to(z)).square().sum())(m(b["x"])),
    "refuses what it does not know": lambda m, b: OnlyOnce.apply(m(b["x"])).mean(),
    "a kink at zero": lambda m, b: F.cross_entropy(Kinked.apply(m(b["x"]).relu()), b["y"]),
}


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = net(nn.ReLU())
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("statistics", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_stays_right(name: str, dtype: torch.dtype) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        ones = {"weight": torch.ones(16), "keep": torch.ones(16, 3), "mask": torch.ones(16, 3)}
        batch = cast({**classes(), **ones}, dtype)
        rows = audit(Plain().to(dtype), batch, RIGHT[name], method="probe", seed=seed)
        assert not [row for row in rows if row.outcome is Outcome.FAIL], [r.message for r in rows]
        assert all(row.parameter for row in rows)
