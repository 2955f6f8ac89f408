"""Where torch documents another gradient than the derivative: it passes, and a bug beside it is still found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.ao.quantization as quantization
from torch import nn
from torch.nn import functional as F

from audits.outcomes import Outcome, ResultRow
from tests.audits.gradients.cases import FINITE, Activation, ScaledSwish, Swish, audit, classes, failing
from tests.audits.gradients.test_stops import wrong

CONVENTION = "torch's convention"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def causes(rows: list[ResultRow]) -> dict[str | None, str | None]:
    return {row.parameter: row.cause for row in rows if row.check == FINITE}


class Wrong(torch.autograd.Function):
    """The identity; its backward doubles the gradient of one token."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(tokens)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (tokens,) = ctx.saved_tensors
        return gradient * (1.0 + (tokens == 5).unsqueeze(-1)), None


class Tokens(nn.Module):
    """A language model; `wrong` doubles the gradient of the row of token 5, `tied` shares the embedding's weight."""

    def __init__(
        self, embedding: nn.Module, *, wrong: bool = False, tied: bool = False, detached: bool = False
    ) -> None:
        super().__init__()
        self.embed, self.mix, self.head = embedding, nn.Linear(8, 8), nn.Linear(8, 23, bias=False)
        self.wrong, self.detached = wrong, detached
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x)
        if self.wrong and h.dim() == 3:
            h = Wrong.apply(h, x)
        h = torch.tanh(self.mix(h))
        return self.head(h.detach() + 0.1 * h if self.detached else h)


def sentences() -> dict[str, torch.Tensor]:
    x = torch.randint(1, 23, (4, 7))
    x[:, -2:], x[0, 0], x[0, 1:3] = 0, 5, 7
    return {"x": x, "y": torch.randint(0, 23, (4, 7))}


def language_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    out = model(batch["x"])
    target = batch["y"] if out.dim() == 3 else batch["y"][:, 0]
    return F.cross_entropy(out.flatten(0, -2), target.flatten())


def filled(embedding: nn.Module) -> nn.Module:
    """Weights drawn anew: the padding row is not zero, as after loading a checkpoint."""
    nn.init.normal_(embedding.weight)
    return embedding


EMBEDDINGS: dict[str, Callable[[], nn.Module]] = {
    "padding": lambda: nn.Embedding(23, 8, padding_idx=0),
    "sparse padding": lambda: nn.Embedding(23, 8, padding_idx=0, sparse=True),
    "frequency": lambda: nn.Embedding(23, 8, scale_grad_by_freq=True),
    "both": lambda: nn.Embedding(23, 8, padding_idx=0, scale_grad_by_freq=True),
}


@pytest.mark.sampled
@DTYPES
@pytest.mark.parametrize("method", ["auto", "probe", "elementwise"])
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_an_embeddings_convention_passes_and_a_wrong_row_beside_it_fails(
    name: str, method: str, dtype: torch.dtype
) -> None:
    if method == "elementwise" and dtype is torch.float32:
        pytest.skip("the method's defaults are float64's")
    torch.manual_seed(0)
    batch = sentences()
    rows = audit(Tokens(filled(EMBEDDINGS[name]())).to(dtype), batch, language_loss, method=method)
    assert not failing(rows)
    assert {row.outcome for row in rows} == {Outcome.PASS}
    if method != "elementwise":
        assert causes(rows)["embed.weight"] == CONVENTION
    assert causes(rows)["mix.weight"] is None
    rows = audit(Tokens(filled(EMBEDDINGS[name]()), wrong=True).to(dtype), batch, language_loss, method=method)
    assert failing(rows) == {"embed.weight"}


def test_the_padding_row_of_a_large_embedding_is_excused_alone() -> None:
    torch.manual_seed(0)
    batch = sentences()
    assert not failing(audit(Tokens(filled(nn.Embedding(3000, 8, padding_idx=0))), batch, language_loss))
    rows = audit(Tokens(filled(nn.Embedding(3000, 8, padding_idx=0)), wrong=True), batch, language_loss)
    assert failing(rows) == {"embed.weight"}


def test_a_tied_heads_use_of_the_padding_row_is_judged() -> None:
    class Head(torch.autograd.Function):
        """A linear head whose weight gets no gradient for class 0."""

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x, weight)
            return x @ weight.T

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x, weight = ctx.saved_tensors
            by_weight = gradient.flatten(0, -2).T @ x.flatten(0, -2)
            return gradient @ weight, torch.cat([0 * by_weight[:1], by_weight[1:]])

    class Applied(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Head.apply(x, self.weight)

    torch.manual_seed(0)
    batch = sentences()
    model = Tokens(filled(nn.Embedding(23, 8, padding_idx=0)), tied=True)
    rows = audit(model, batch, language_loss, method="probe")
    assert not failing(rows)
    assert causes(rows)["embed.weight"] == CONVENTION
    model.head = Applied(model.embed.weight)
    assert "embed.weight" in failing(audit(model, batch, language_loss, method="probe"))


@pytest.mark.sampled
@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("padding", [None, 0])
def test_bags_scaled_by_frequency_pass_and_a_detached_path_behind_them_fails(mode: str, padding: int | None) -> None:
    def bag() -> nn.Module:
        return filled(nn.EmbeddingBag(23, 8, mode=mode, padding_idx=padding, scale_grad_by_freq=True))

    torch.manual_seed(0)
    rows = audit(Tokens(bag()), sentences(), language_loss)
    assert not failing(rows)
    assert causes(rows)["embed.weight"] == CONVENTION
    assert "embed.weight" in failing(audit(Tokens(bag(), detached=True), sentences(), language_loss))


class Quantised(nn.Module):
    """Fake-quantised weights between two layers, one of which applies a Function."""

    def __init__(self, kind: str, function: type[torch.autograd.Function] = Swish) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(8, 12), Activation(function), nn.Linear(12, 3)
        self.kind = kind
        self.register_buffer("scale", torch.full((12,), 0.05))
        self.register_buffer("zero", torch.zeros(12, dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.first.weight
        if self.kind == "tensor":
            weight = torch.fake_quantize_per_tensor_affine(weight, 0.02, 0, -8, 7)
        elif self.kind == "tensors":
            weight = torch.fake_quantize_per_tensor_affine(weight, self.scale[:1].float(), self.zero[:1], -8, 7)
        else:
            weight = torch.fake_quantize_per_channel_affine(weight, self.scale.float(), self.zero, 0, -8, 7)
        return self.last(self.act(F.linear(self.act(x), weight, self.first.bias)))


@pytest.mark.slow
@pytest.mark.sampled
@DTYPES
@pytest.mark.parametrize("kind", ["tensor", "tensors", "channels"])
def test_fake_quantisation_passes_and_a_wrong_function_beside_it_fails(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batch = {"x": torch.randn(16, 8, dtype=dtype), "y": torch.randint(0, 3, (16,))}
    rows = audit(Quantised(kind).to(dtype), batch)
    assert not failing(rows)
    assert causes(rows)["first.weight"] == CONVENTION
    assert failing(audit(Quantised(kind, ScaledSwish).to(dtype), batch)) == {"first.weight", "first.bias"}


@pytest.mark.sampled(cases=1)
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Please use quant_min:UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("fused", [False, True])
def test_qat_modules_and_observers_pass_and_a_wrong_function_between_them_fails(fused: bool) -> None:
    def model(function: type[torch.autograd.Function]) -> nn.Module:
        inner = nn.Sequential(nn.Linear(8, 12), Activation(function), nn.Linear(12, 3))
        whole = nn.Sequential(quantization.QuantStub(), inner, quantization.DeQuantStub()).train()
        whole.qconfig = quantization.get_default_qat_qconfig("fbgemm", version=int(fused))
        return quantization.prepare_qat(whole)

    torch.manual_seed(0)
    batch = classes()
    rows = audit(model(Swish), batch)
    assert not failing(rows)
    assert set(causes(rows).values()) == {CONVENTION}
    assert failing(audit(model(ScaledSwish), batch)) == {"1.0.weight", "1.0.bias"}


class Straight(nn.Module):
    """Rounded activations, straight through; `stopped` adds an accidental detach, `function` a Function before."""

    def __init__(
        self, how: str, *, stopped: bool = False, function: type[torch.autograd.Function] = Swish
    ) -> None:  # fmt: skip
        super().__init__()
        self.first, self.act, self.last = nn.Linear(8, 12), Activation(function), nn.Linear(12, 3)
        self.how, self.stopped = how, stopped

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.act(self.first(x))
        q = (4 * h).round() / 4
        if self.how == "detach first":
            out = q - h.detach() + h
        elif self.how == "difference":
            out = h + (q - h).detach()
        elif self.how == "data":
            out = h + (q - h).data
        elif self.how == "no_grad":
            with torch.no_grad():
                change = q - h
            out = change + h
        elif self.how == "in place":
            out = h.clone()
            out += (q - out).detach()
        elif self.how == "gumbel":
            out = F.gumbel_softmax(h, hard=True)
        else:
            out = torch.distributions.OneHotCategoricalStraightThrough(logits=h).rsample()
        if self.stopped:
            out = out + torch.tanh(h.detach())
        return self.last(torch.tanh(out))


IDIOMS = ["detach first", "difference", "data", "no_grad", "in place", "gumbel", "one-hot"]


@pytest.mark.slow
@pytest.mark.parametrize("how", IDIOMS)
def test_a_straight_through_estimate_passes_and_a_bug_beside_it_fails(how: str) -> None:
    torch.manual_seed(0)
    batch = classes()
    rows = audit(Straight(how), batch, method="probe")
    assert not failing(rows)
    assert {causes(rows)[name] for name in ("first.weight", "first.bias")} == {CONVENTION}
    assert "straight-through" in next(row.message for row in rows if row.parameter == "first.weight")
    before = {"first.weight", "first.bias"}
    assert failing(audit(Straight(how, stopped=True), batch, method="probe")) == before
    rows = audit(Straight(how, function=ScaledSwish), batch, method="probe")
    assert failing(rows) == before
    assert {row.cause for row in wrong(rows)} == {"wrong backward of ScaledSwish in Activation (act)"}


@pytest.mark.parametrize(
    "accident",
    [
        lambda h: h + 0.3 * torch.tanh(h).detach(),
        lambda h: h + h.detach(),
        lambda h: h - 0.5 * h.detach(),
        lambda h: h * h.detach(),
        lambda h: torch.tanh(h).detach() + 0.1 * h,
    ],
)
def test_a_value_that_is_merely_detached_fails(accident: Callable[[torch.Tensor], torch.Tensor]) -> None:
    class Detached(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return accident(x)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), Detached(), nn.Linear(12, 3))
    rows = audit(model, classes(), method="probe")
    assert failing(rows) == {"0.weight", "0.bias"}
    assert {row.cause for row in wrong(rows)} == {"stop-gradient at Detached (1)"}


@pytest.mark.parametrize("right", [False, True])
def test_residual_quantisation_passes_only_where_its_rest_is_detached(right: bool) -> None:
    class Stages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 6), nn.Linear(6, 3)
            self.register_buffer("codes", torch.randn(2, 16, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rest = self.first(x)
            total = torch.zeros_like(rest)
            for codes in self.codes:
                code = codes[torch.cdist(rest.detach(), codes).argmin(1)]
                code = rest + (code - rest).detach()
                total = total + code
                rest = rest - (code.detach() if right else code)
            return self.last(total + 0.1 * rest.square())

    torch.manual_seed(0)
    rows = audit(Stages(), classes(), method="probe")
    assert failing(rows) == (set() if right else {"first.weight", "first.bias"})
    if not right:
        assert {row.cause for row in wrong(rows)} == {"cancelled gradient at Stages"}
