"""Layers of unusual make: adapters, experts, Functions, spectra, flows, graphs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.models.ordinary.kinds import Made, Named, labelled, mlp, ordinary


@ordinary
def old_spectral_norm() -> Made:
    model = nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.utils.spectral_norm(nn.Linear(16, 16)), nn.ReLU(), nn.Linear(16, 3)
    )
    return model, labelled(), "cross_entropy"


class Lora(nn.Module):
    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base, self.scaling, self.dropout = base.requires_grad_(False), 2.0, nn.Dropout(0.05)
        self.lora_a, self.lora_b = nn.Linear(base.in_features, rank, False), nn.Linear(rank, base.out_features, False)
        nn.init.kaiming_uniform_(self.lora_a.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.lora_b(self.lora_a(self.dropout(x))) * self.scaling


@ordinary
def lora_on_mlp() -> Made:
    return nn.Sequential(Lora(nn.Linear(8, 16)), nn.SiLU(), Lora(nn.Linear(16, 3))), labelled(), "cross_entropy"


class Switch(nn.Module):
    """Top-1 routing with capacity and a load balancing loss."""

    def __init__(self, width: int = 8, experts: int = 4) -> None:
        super().__init__()
        self.router, self.capacity = nn.Linear(width, experts, bias=False), 6
        self.experts = nn.ModuleList(mlp(width, 16, width) for _ in range(experts))
        self.head, self.balance = nn.Linear(width, 3), torch.zeros(())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        share = self.router(x).softmax(-1)
        weight, chosen = share.max(-1)
        out = x.clone()
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).nonzero().squeeze(-1)[: self.capacity]
            if len(rows):
                out[rows] = x[rows] + expert(x[rows]) * weight[rows, None]
        counts = F.one_hot(chosen, share.shape[-1]).float().mean(0)
        self.balance = share.shape[-1] * (counts * share.mean(0)).sum()
        return self.head(out)


@ordinary
def switch_transformer_layer() -> Made:
    return Switch(), labelled(24), lambda m, b: F.cross_entropy(m(b["x"]), b["y"]) + 0.01 * m.balance


@ordinary
def noisy_topk_experts() -> Made:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.noise = nn.Parameter(torch.randn(8, 4) * 0.3), nn.Parameter(torch.randn(8, 4) * 0.1)
            self.experts, self.head = nn.ModuleList(mlp(8, 12, 8) for _ in range(4)), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            clean = x @ self.gate
            logits = clean + torch.randn_like(clean) * F.softplus(x @ self.noise)
            values, chosen = logits.topk(2, -1)
            gates = torch.zeros_like(logits).scatter(-1, chosen, values.softmax(-1))
            outs = torch.stack([expert(x) for expert in self.experts], 1)
            return self.head((gates[..., None] * outs).sum(1))

    return Noisy(), labelled(), "cross_entropy"


@ordinary
def mixed_double_buffers() -> Made:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.randn(8, dtype=torch.float64))
            self.register_buffer("std", torch.rand(8, dtype=torch.float64) + 0.5)
            self.body = mlp(8, 16, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(((x.double() - self.mean) / self.std).float())

    return Scaled(), labelled(), "cross_entropy"


@ordinary
def fourier_operator() -> Made:
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 6, 4, dtype=torch.cfloat) / 6)
            self.skip = nn.Conv1d(6, 6, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            modes = torch.fft.rfft(x)
            out = torch.zeros_like(modes)
            out[..., :4] = torch.einsum("bik,iok->bok", modes[..., :4], self.weight)
            return F.gelu(torch.fft.irfft(out, n=x.shape[-1]) + self.skip(x))

    model = nn.Sequential(nn.Conv1d(1, 6, 1), Spectral(), Spectral(), nn.Conv1d(6, 1, 1))

    def loss(m: Any, b: Any) -> torch.Tensor:
        out = m(b["x"])
        return ((out - b["y"]).flatten(1).norm(dim=1) / b["y"].flatten(1).norm(dim=1)).mean()

    return model, {"x": torch.randn(4, 1, 16), "y": torch.randn(4, 1, 16)}, loss


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return g * (s * (1 + x * (1 - s)))


class FusedSoftmaxLoss(torch.autograd.Function):
    """Cross-entropy whose gradient is computed in the forward, as fused losses do."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        log = logits.log_softmax(-1)
        gradient = log.exp()
        gradient[torch.arange(len(target)), target] -= 1
        ctx.save_for_backward(gradient / len(target))
        return -log[torch.arange(len(target)), target].mean()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.saved_tensors[0] * g, None


@ordinary
def custom_functions() -> Made:
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(Swish.apply(self.first(x)))

    return Body(), labelled(), lambda m, b: FusedSoftmaxLoss.apply(m(b["x"]), b["y"])


@ordinary
def checkpointed_blocks() -> Made:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.leave = nn.Linear(8, 16), nn.Linear(16, 3)
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU(), nn.Dropout(0.1)) for _ in range(3)
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.enter(x)
            for block in self.blocks:
                h = h + checkpoint(block, h, use_reentrant=False)
            return self.leave(h)

    return Stack(), labelled(), "cross_entropy"


@ordinary
def coupling_flow() -> Made:
    class Flow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps = nn.ModuleList(mlp(3, 16, 6, act=nn.Tanh) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            log = torch.zeros(len(x))
            for step in self.steps:
                a, b = x.chunk(2, -1)
                scale, shift = step(a).chunk(2, -1)
                scale = torch.tanh(scale)
                x, log = torch.cat([b * scale.exp() + shift, a], -1), log + scale.sum(-1)
            return -0.5 * x.square().sum(-1) + log

    return Flow(), {"x": torch.randn(16, 6)}, lambda m, b: -m(b["x"]).mean()


@ordinary
def graph_attention() -> Made:
    class Gat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.score, self.leave = nn.Linear(6, 8, False), nn.Linear(16, 1, False), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
            h = self.enter(x)
            source, target = edges
            score = F.leaky_relu(self.score(torch.cat([h[source], h[target]], -1)).squeeze(-1), 0.2)
            top = torch.zeros(len(x)).scatter_reduce(0, target, score.detach(), "amax", include_self=False)
            share = (score - top[target]).exp()
            share = share / torch.zeros(len(x)).index_add(0, target, share)[target]
            return self.leave(F.elu(torch.zeros_like(h).index_add(0, target, share[:, None] * h[source])))

    edges = torch.cat([torch.randint(0, 10, (2, 30)), torch.arange(10).expand(2, 10)], 1)
    batch = {"x": torch.randn(10, 6), "edges": edges, "y": torch.randint(0, 3, (10,))}
    return Gat(), batch, lambda m, b: F.cross_entropy(m(b["x"], b["edges"]), b["y"])


@ordinary
def neural_ode_rk4() -> Made:
    field = mlp(3, 24, 3, act=nn.Softplus)

    def loss(m: Any, b: Any) -> torch.Tensor:
        x, step = b["x"], 0.1
        for _ in range(5):
            k1 = m(x)
            k2 = m(x + step / 2 * k1)
            k3 = m(x + step / 2 * k2)
            x = x + step / 6 * (k1 + 2 * k2 + 2 * k3 + m(x + step * k3))
        return F.mse_loss(x, b["y"])

    return field, {"x": torch.randn(8, 3), "y": torch.randn(8, 3)}, loss


@ordinary
def layer_scale_and_stochastic_depth() -> Made:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.leave = nn.Linear(8, 16), nn.Linear(16, 3)
            self.blocks = nn.ModuleList(mlp(16, 32, 16, act=nn.GELU) for _ in range(3))
            self.scales = nn.ParameterList(nn.Parameter(torch.full((16,), 1e-6)) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.enter(x)
            for block, scale in zip(self.blocks, self.scales, strict=True):
                keep = (torch.rand(len(x), 1) > 0.2).float() / 0.8
                h = h + keep * scale * block(h)
            return self.leave(h)

    return Net(), labelled(), "cross_entropy"


@ordinary
def zero_initialised_head() -> Made:
    model = mlp(8, 32, 3)
    nn.init.zeros_(model[-1].weight)
    nn.init.zeros_(model[-1].bias)
    return model, labelled(), "cross_entropy"


@ordinary
def gaussian_process_marginal() -> Made:
    class Gp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.length, self.noise = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.tensor(-2.0))

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            scaled = x / self.length.exp()
            apart = (scaled[:, None] - scaled[None]).square().sum(-1)
            factor = torch.linalg.cholesky((-0.5 * apart).exp() + self.noise.exp() * torch.eye(len(x)))
            solved = torch.cholesky_solve(y[:, None], factor).squeeze(-1)
            return 0.5 * y @ solved + factor.diagonal().log().sum()

    return Gp(), {"x": torch.randn(12, 4), "y": torch.randn(12)}, lambda m, b: m(b["x"], b["y"])


@ordinary
def cross_layer_unused_branch() -> Made:
    """A pooler that a fine-tuning loss does not use, as BERT carries one."""
    model = Named(body=mlp(8, 16, 8), head=nn.Linear(8, 3), pooler=nn.Linear(8, 8))
    return model, labelled(), lambda m, b: F.cross_entropy(m.head(m.body(b["x"])), b["y"])
