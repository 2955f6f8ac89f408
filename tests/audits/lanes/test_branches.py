"""Every operator that decides on a floating value: frozen at theta, its difference is autograd's gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from audits.gradients.methods.probe import Prober
from audits.lanes.evaluation import Point
from audits.lanes.kinks.branches import all_rules
from audits.lanes.problem import Problem

#: Every kink of the activations below, hit exactly, and equal values for the order statistics.
TIES = torch.tensor(
    [-6.0, -3.0, -1.0, -0.5, 0.0, 0.0, 0.5, 1.0, 1.0, 3.0, 6.0, 2.0, 2.0, -1.0, 20.0, 0.25, -0.0, 2.5, -2.5, 4.0,
     4.0, -6.0, 1.5, 0.75]
)  # fmt: skip
OTHER = torch.tensor(
    [-6.0, -2.0, -1.0, -0.5, 0.0, 1.0, 0.5, 1.5, 1.0, 3.0, 5.0, 2.0, -2.0, -1.0, 20.0, 0.25, 0.0, 2.0, -2.5, 4.0,
     -4.0, 6.0, 1.5, 0.5]
)  # fmt: skip
LABELS = torch.tensor([0, 2, 1, 3])
SEGMENTS = torch.tensor([0, 1, 0, 2, 1, 0, 2, 2, 1, 1, 0, 0, 0, 1, 2, 2, 1, 0, 0, 1, 1, 1, 2, 0])

Function = Callable[[torch.Tensor], torch.Tensor]


def rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(4, 6)


def image(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(1, 1, 4, 6)


def volume(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(1, 1, 2, 3, 4)


def reduced(reduce: str, include_self: bool) -> Function:
    return lambda x: torch.tensor([0.5, 1.0, 2.0], dtype=x.dtype).scatter_reduce(
        0, SEGMENTS, x, reduce, include_self=include_self
    )


def ctc(log_probabilities: torch.Tensor) -> torch.Tensor:
    return F.ctc_loss(log_probabilities, torch.tensor([[1, 2, 1]]), torch.tensor([6]), torch.tensor([3]))


def grid(mode: str, padding: str, align: bool) -> Function:
    def sample(x: torch.Tensor) -> torch.Tensor:
        places = (x.reshape(1, 3, 4, 2) / 4).clamp(-1.6, 1.6)
        picture = torch.arange(20.0, dtype=x.dtype).reshape(1, 1, 4, 5).sin() + x.sum() / 100
        return F.grid_sample(picture, places, mode=mode, padding_mode=padding, align_corners=align)

    return sample


CASES: dict[str, Function] = {
    "relu": F.relu,
    "relu_": lambda x: F.relu_(x * 1.0),
    "relu6": F.relu6,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "prelu": lambda x: F.prelu(x, (x.sum() / 100).reshape(1)),
    "rrelu eval": lambda x: F.rrelu(x, training=False),
    "rrelu train": lambda x: F.rrelu(x, training=True),
    "elu": lambda x: F.elu(x, 0.7),
    "selu": F.selu,
    "celu": lambda x: F.celu(x, 0.5),
    "hardtanh": lambda x: F.hardtanh(x, -1.0, 3.0),
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "hardshrink": F.hardshrink,
    "softshrink": F.softshrink,
    "softplus": F.softplus,
    "threshold": lambda x: F.threshold(x, 1.0, 0.3),
    "logsigmoid": F.logsigmoid,
    "softsign": F.softsign,
    "abs": torch.abs,
    "abs_": lambda x: (x * 1.0).abs_(),
    "sign": lambda x: x.sign() * x,
    "sgn": lambda x: x.sgn() * x,
    "floor": lambda x: x.floor() * x,
    "ceil": lambda x: x.ceil() * x,
    "round": lambda x: x.round() * x,
    "round decimals": lambda x: x.round(decimals=1) * x,
    "trunc": lambda x: x.trunc() * x,
    "frac": torch.frac,
    "remainder": lambda x: x % 0.5,
    "remainder both": lambda x: torch.remainder(x, x.roll(1) + 7.3),
    "fmod": lambda x: torch.fmod(x, 0.7),
    "floor divide": lambda x: (x.detach() // 0.7) * x,
    "div trunc": lambda x: torch.div(x, 0.7, rounding_mode="trunc") * x,
    "clamp": lambda x: x.clamp(-1.0, 3.0),
    "clamp_": lambda x: (x * 1.0).clamp_(-1.0, 3.0),
    "clamp one": lambda x: x.clamp(max=1.0),
    "clamp_min": lambda x: x.clamp_min(0.5),
    "clamp_max": lambda x: x.clamp_max(1.0),
    "clamp tensors": lambda x: x.clamp(x.roll(3) - 2.1, x.roll(5) + 2.1),
    "clamp_min tensor": lambda x: torch.clamp_min(x, OTHER.to(x)),
    "nan_to_num": lambda x: torch.where(x > 100, torch.inf, x).nan_to_num(),
    "maximum": lambda x: torch.maximum(x, OTHER.to(x) * x.square().mean() / x.square().mean()),
    "minimum": lambda x: torch.minimum(x, x.flip(0)),
    "fmax": lambda x: torch.fmax(x, x.flip(0)),
    "fmin": lambda x: torch.fmin(x, x.flip(0)),
    "copysign": lambda x: torch.copysign(x, x.roll(1)),
    "atan2": lambda x: torch.atan2(x * 1e-9, -1 - x.square()),
    "heaviside": lambda x: torch.heaviside(x.detach(), torch.tensor(0.5, dtype=x.dtype)) * x,
    "max": lambda x: x.clamp(-9, 6).max(),
    "min": torch.min,
    "median": torch.median,
    "nanmedian": torch.nanmedian,
    "max dim": lambda x: rows(x).max(1).values,
    "max dim keep": lambda x: rows(x).max(0, keepdim=True).values,
    "min dim": lambda x: rows(x).min(1).values,
    "median dim": lambda x: rows(x).median(1).values,
    "nanmedian dim": lambda x: rows(x).nanmedian(1).values,
    "mode": lambda x: rows(x).mode(1).values,
    "kthvalue": lambda x: rows(x).kthvalue(3, 1).values,
    "amax": lambda x: rows(x).amax(1),
    "amax keep": lambda x: rows(x).amax((0, 1), keepdim=True),
    "amax all": lambda x: rows(x).amax(),
    "amin": lambda x: rows(x).amin((0, 1)),
    "aminmax": lambda x: torch.stack(list(rows(x).aminmax(dim=1)), 0),
    "aminmax all": lambda x: torch.stack(list(x.aminmax())),
    "topk": lambda x: rows(x).topk(2, 1).values,
    "sort": lambda x: rows(x).sort(1).values.cumsum(1),
    "sort stable": lambda x: rows(x).sort(dim=1, stable=True, descending=True).values.cumsum(1),
    "msort": lambda x: torch.msort(rows(x)).cumsum(0),
    "argsort": lambda x: x[x.argsort()].cumsum(0),
    "quantile": lambda x: rows(x).quantile(0.3, dim=1),
    "cummax": lambda x: rows(x).cummax(1).values,
    "cummin": lambda x: rows(x).cummin(1).values,
    "unique masks": lambda x: x[x > 0.5].square(),
    "where": lambda x: torch.where(x >= 1.0, x.square(), 3 * x),
    "masked_fill": lambda x: x.masked_fill(x.le(0), 0.0),
    "comparison in place": lambda x: (x * 1.0).detach().gt_(0.6) * x,
    "nonzero": lambda x: x[x.nonzero(as_tuple=True)].square(),
    "bucketize": lambda x: torch.bucketize(x, torch.tensor([0.0, 1.0, 2.0], dtype=x.dtype)) * x,
    "searchsorted": lambda x: torch.searchsorted(torch.tensor([0.0, 1.0, 2.0], dtype=x.dtype), x.detach()) * x,
    "argmax": lambda x: rows(x)[torch.arange(4), rows(x).argmax(1)],
    "to int": lambda x: x.to(torch.int64) * x,
    "isclose": lambda x: torch.isclose(x, x.roll(1)) * x,
    "max_pool1d": lambda x: F.max_pool1d(x.reshape(1, 1, 24), 3, 2),
    "max_pool2d": lambda x: F.max_pool2d(image(x), 2),
    "max_pool2d padded": lambda x: F.max_pool2d(image(x), 3, 1, 1, ceil_mode=True),
    "max_pool3d": lambda x: F.max_pool3d(volume(x), (1, 2, 2)),
    "adaptive_max_pool1d": lambda x: F.adaptive_max_pool1d(x.reshape(1, 1, 24), 5),
    "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(image(x), 2),
    "adaptive_max_pool3d": lambda x: F.adaptive_max_pool3d(volume(x), (1, 2, 2)),
    "fractional_max_pool2d": lambda x: F.fractional_max_pool2d(image(x), 2, output_size=(2, 3)),
    "fractional_max_pool3d": lambda x: F.fractional_max_pool3d(
        x.reshape(1, 1, 3, 2, 4), (1, 1, 2), output_size=(2, 1, 2)
    ),
    "max_unpool2d": lambda x: F.max_unpool2d(*F.max_pool2d(image(x), 2, return_indices=True), 2),
    "norm 1": lambda x: torch.linalg.vector_norm(rows(x), 1, 1),
    "norm inf": lambda x: torch.linalg.vector_norm(rows(x), float("inf"), 1),
    "norm -inf": lambda x: torch.linalg.vector_norm(rows(x) + 1.0, float("-inf"), 1, keepdim=True),
    "norm 0": lambda x: torch.linalg.vector_norm(x, 0) * x,
    "old norm": lambda x: x.norm(1),
    "dist 1": lambda x: torch.dist(x, OTHER.to(x), 1),
    "normalize": lambda x: F.normalize(rows(x), p=1.0),
    "cdist 1": lambda x: torch.cdist(rows(x), rows(x).flip(0), 1.0),
    "cdist inf": lambda x: torch.cdist(rows(x), rows(OTHER.to(x)), float("inf")),
    "pdist 1": lambda x: F.pdist(rows(x), 1.0),
    "scatter amax": reduced("amax", True),
    "scatter amin": reduced("amin", False),
    "index_reduce": lambda x: torch.zeros(3, dtype=x.dtype).index_reduce(0, SEGMENTS, x, "amax"),
    "segment_reduce": lambda x: torch.segment_reduce(x, "max", lengths=torch.tensor([5, 7, 12])),
    "embedding_bag max": lambda x: F.embedding_bag(SEGMENTS.reshape(4, 6) + 1, x.reshape(6, 4), mode="max"),
    "ctc": lambda x: ctc(x.reshape(6, 1, 4).log_softmax(-1)),
    "ctc of log probabilities moved out of what is normalised": lambda x: ctc(
        x.detach().reshape(6, 1, 4).log_softmax(-1) + (x - x.detach()).reshape(6, 1, 4)
    ),
    "embedding padded": lambda x: F.embedding(SEGMENTS + 1, x.reshape(6, 4), padding_idx=1),
    "embedding by frequency": lambda x: F.embedding(SEGMENTS + 1, x.reshape(6, 4), 2, scale_grad_by_freq=True),
    "embedding_bag by frequency": lambda x: F.embedding_bag(
        SEGMENTS.reshape(4, 6) + 1, x.reshape(6, 4), scale_grad_by_freq=True
    ),
    "embedding_bag sum padded": lambda x: F.embedding_bag(
        SEGMENTS.reshape(4, 6) + 1, x.reshape(6, 4), mode="sum", scale_grad_by_freq=True, padding_idx=2
    ),
    "fake_quantize": lambda x: torch.fake_quantize_per_tensor_affine(x, 0.3, 1, -8, 7),
    "fake_quantize tensors": lambda x: torch.fake_quantize_per_tensor_affine(
        x, torch.full((1,), 0.3), torch.ones(1, dtype=torch.int32), -8, 7
    ),
    "fake_quantize channels": lambda x: torch.fake_quantize_per_channel_affine(
        rows(x), 0.1 + torch.arange(4, dtype=torch.float32), torch.zeros(4, dtype=torch.int32), 0, -8, 7
    ),
    "fake_quantize fused": lambda x: torch.fused_moving_avg_obs_fake_quant(
        x,
        torch.ones(1, dtype=torch.int64),
        torch.ones(1, dtype=torch.int64),
        torch.tensor(-2.0),
        torch.tensor(3.0),
        torch.ones(1),
        torch.zeros(1, dtype=torch.int32),
        0.01,
        0,
        255,
        -1,
    ),
    "fake_quantize learnable": lambda x: torch._fake_quantize_learnable_per_tensor_affine(
        x, 0.3 + x[:2].square().mean().reshape(1) / 100, x[3:4] / 7, -8, 7, 0.7
    ),
    "fake_quantize learnable channels": lambda x: torch._fake_quantize_learnable_per_channel_affine(
        rows(x), 0.3 + x[:4].square() / 100, x[4:8] / 7, 0, -8, 7, 0.7
    ),
    "renorm": lambda x: torch.renorm(rows(x), 2, 0, 9.0),
    "l1": lambda x: F.l1_loss(x, OTHER.to(x)),
    "huber": lambda x: F.huber_loss(x, OTHER.to(x)),
    "smooth_l1": lambda x: F.smooth_l1_loss(x, OTHER.to(x), beta=0.5, reduction="none"),
    "smooth_l1 0": lambda x: F.smooth_l1_loss(x, OTHER.to(x), beta=0.0, reduction="sum"),
    "hinge embedding": lambda x: F.hinge_embedding_loss(x, OTHER.sign().to(x).where(OTHER != 0, 1.0)),
    "margin ranking": lambda x: F.margin_ranking_loss(x, x.roll(1), torch.ones(24, dtype=x.dtype), margin=1.0),
    "multi_margin": lambda x: F.multi_margin_loss(rows(x), LABELS),
    "multi_margin 2": lambda x: F.multi_margin_loss(rows(x), LABELS, p=2, margin=0.5, weight=torch.arange(6).to(x)),
    "multilabel_margin": lambda x: F.multilabel_margin_loss(
        rows(x), torch.tensor([[1, 3, -1, 0, 0, 0], [0, -1, 2, 2, 2, 2], [5, 4, 3, 2, 1, 0], [-1, 0, 0, 0, 0, 0]])
    ),
    "triplet": lambda x: F.triplet_margin_loss(rows(x), rows(x).roll(1, 0), rows(x).flip(1), swap=True),
    "cosine embedding": lambda x: F.cosine_embedding_loss(
        rows(x), rows(x).flip(1), torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=x.dtype)
    ),
    "bce": lambda x: F.binary_cross_entropy(x.sigmoid(), OTHER.to(x).sigmoid()),
    "bce logits": lambda x: F.binary_cross_entropy_with_logits(x, OTHER.to(x).sigmoid()),
    "routing": lambda x: rows(x).softmax(1).topk(2, 1).values * rows(x).gather(1, rows(x).topk(2, 1).indices),
    "grid_sample 3d": lambda x: F.grid_sample(
        torch.arange(24.0, dtype=x.dtype).cos().reshape(1, 1, 2, 3, 4),
        x.reshape(1, 2, 2, 2, 3) / 7,
        align_corners=False,
    ),
    **{
        f"grid_sample {mode} {padding} {align}": grid(mode, padding, align)
        for mode in ("bilinear", "nearest")
        for padding in ("zeros", "border", "reflection")
        for align in (False, True)
    },
}


#: torch computes these backwards with a float32 constant inside: 1/6, and the relative error it makes.
ROUNDED = {"hardsigmoid": 2e-7}


def probes_of(function: Function, start: torch.Tensor, slack: float = 0.0) -> list[float]:
    x = start.double().requires_grad_()
    weights = torch.linspace(0.4, 1.7, 400, dtype=torch.float64)

    def loss() -> torch.Tensor:
        out = function(x)
        return (out.reshape(-1) * weights[: out.numel()]).sum() + x.square().sum() / 10

    point = Point(Problem({"x": x}, loss, lambda: torch.manual_seed(0) and None))
    prober = Prober(point, seed=3)
    scales = prober.scales(["x"], 3e-3)
    found = [prober.probe(scales, 3e-3) for _ in range(3)]
    # the bound must resolve: a wrong slope of one of 24 elements is far above it
    assert max(probe.bound for probe in found) < 1e-6 * (1 + max(abs(probe.autograd) for probe in found))
    return [probe.residual / (probe.bound + slack * abs(probe.autograd)) for probe in found]


@pytest.mark.parametrize("name", CASES)
def test_frozen_difference_is_autograds_gradient_at_ties(name: str) -> None:
    assert max(probes_of(CASES[name], TIES, ROUNDED.get(name, 0.0))) <= 1.0


@pytest.mark.parametrize("name", CASES)
def test_frozen_difference_is_autograds_gradient_elsewhere(name: str) -> None:
    torch.manual_seed(1)
    start = 2 * torch.randn(24, dtype=torch.float64)
    assert max(probes_of(CASES[name], start, ROUNDED.get(name, 0.0))) <= 1.0


PENALISED: dict[str, Function] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "elu": lambda x: F.elu(x, 0.7),
    "hardswish": F.hardswish,
    "hardshrink": F.hardshrink,
    "softshrink": F.softshrink,
    "prelu": lambda x: F.prelu(x, torch.full((1,), 0.3, dtype=x.dtype)),
    "abs": torch.abs,
    "huber": lambda x: F.huber_loss(x, OTHER.to(x)),
    "smooth_l1": lambda x: F.smooth_l1_loss(x, OTHER.to(x)),
    "max_pool": lambda x: F.max_pool2d(image(x), 2),
}


@pytest.mark.parametrize("name", PENALISED)
def test_gradient_penalty_freezes_the_backward_too(name: str) -> None:
    def penalised(x: torch.Tensor) -> torch.Tensor:
        out = PENALISED[name](x * x.roll(1).cos() + x)
        (slope,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return slope.square()

    torch.manual_seed(2)
    assert max(probes_of(penalised, TIES + 0.01 * torch.randn(24))) <= 1.0


def test_every_rule_is_exercised() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    from audits.lanes.emulation import run
    from audits.lanes.lifting import traits

    seen: set[str] = set()

    import warnings

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.add(traits(func).base)
            return run(func, args, kwargs or {})

    for function in [*CASES.values(), *PENALISED.values()]:
        x = (TIES + 0.01).double().requires_grad_()
        with Watch(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # betas and old defaults, warned of once per process
            torch.autograd.grad(function(x).square().sum(), x)
    missing = set(all_rules()) - seen
    assert not missing


def test_the_documented_table_names_every_rule() -> None:
    from pathlib import Path

    text = (Path(__file__).parents[3] / "docs" / "explanation" / "gradient_check.md").read_text(encoding="utf-8")
    assert [name for name in all_rules() if f"`{name}`" not in text] == []
