"""Objectives: contrast, reinforcement, distillation, quantiles, masks, mining."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.models.ordinary.kinds import Made, Named, labelled, mlp, ordinary


@ordinary
def contrastive_clip() -> Made:
    model = Named(image=mlp(12, 32, 8, act=nn.GELU), text=mlp(10, 32, 8, act=nn.GELU))
    model.temperature = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def loss(m: Any, b: Any) -> torch.Tensor:
        a, t = F.normalize(m.image(b["image"]), dim=-1), F.normalize(m.text(b["text"]), dim=-1)
        logits = m.temperature.exp().clamp(max=100) * a @ t.T
        labels = torch.arange(len(a))
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    return model, {"image": torch.randn(8, 12), "text": torch.randn(8, 10)}, loss


@ordinary
def simclr_two_views() -> Made:
    model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 8))

    def loss(m: Any, b: Any) -> torch.Tensor:
        views = torch.cat([b["x"] + 0.1 * torch.randn_like(b["x"]) for _ in range(2)])
        z = F.normalize(m(views), dim=1)
        similar = (z @ z.T / 0.5).masked_fill(torch.eye(len(z), dtype=torch.bool), float("-inf"))
        n = len(b["x"])
        return F.cross_entropy(similar, torch.cat([torch.arange(n) + n, torch.arange(n)]))

    return model, {"x": torch.randn(12, 8)}, loss


@ordinary
def byol_with_teacher() -> Made:
    online = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 8))
    model = Named(online=online, predictor=mlp(8, 16, 8), teacher=copy.deepcopy(online).requires_grad_(False))

    def loss(m: Any, b: Any) -> torch.Tensor:
        with torch.no_grad():
            target = m.teacher(b["x"] + 0.1)
        return 2 - 2 * F.cosine_similarity(m.predictor(m.online(b["x"])), target, dim=-1).mean()

    return model, {"x": torch.randn(12, 8)}, loss


@ordinary
def quantile_regression() -> Made:
    def loss(m: Any, b: Any) -> torch.Tensor:
        levels = torch.tensor([0.1, 0.5, 0.9])
        off = b["y"][:, None] - m(b["x"])
        return torch.maximum(levels * off, (levels - 1) * off).mean()

    return mlp(8, 32, 3), {"x": torch.randn(16, 8), "y": torch.randn(16)}, loss


@ordinary
def hard_negative_mining() -> Made:
    def loss(m: Any, b: Any) -> torch.Tensor:
        z = F.normalize(m(b["x"]), dim=-1)
        distance = torch.cdist(z, z)
        same = b["y"][:, None] == b["y"][None]
        positive = distance.masked_fill(~same, float("-inf")).max(1).values
        negative = distance.masked_fill(same, float("inf")).min(1).values
        return F.relu(positive - negative + 0.3).mean()

    return mlp(8, 24, 6), labelled(18), loss


@ordinary
def online_hard_examples() -> Made:
    def loss(m: Any, b: Any) -> torch.Tensor:
        per = F.cross_entropy(m(b["x"]), b["y"], reduction="none")
        return per.topk(len(per) // 4).values.mean() + 0.1 * per.sort(descending=True).values[:3].sum()

    return mlp(8, 24, 3), labelled(), loss


@ordinary
def cosine_near_zero() -> Made:
    batch = {"a": torch.randn(6, 8), "b": torch.randn(6, 8)}
    batch["a"][0], batch["b"][1] = 0, 0
    model = Named(tower=nn.Linear(8, 4, bias=False))

    def loss(m: Any, b: Any) -> torch.Tensor:
        return (1 - F.cosine_similarity(m.tower(b["a"]), m.tower(b["b"]), eps=1e-6)).mean()

    return model, batch, loss


@ordinary
def clamped_norms_at_zero() -> Made:
    batch = {"x": torch.randn(8, 6), "y": torch.randn(8, 4)}
    batch["x"][0] = 0

    def loss(m: Any, b: Any) -> torch.Tensor:
        out = m(b["x"])
        length = out.square().sum(-1).clamp(min=1e-8).sqrt()
        return F.mse_loss(out, b["y"]) + length.mean() + (out.square().sum(-1) + 1e-12).sqrt()[1:].mean()

    return nn.Linear(6, 4, bias=False), batch, loss


@ordinary
def nan_masked_targets() -> Made:
    target = torch.randn(16, 3)
    target[::3, 1] = float("nan")

    def loss(m: Any, b: Any) -> torch.Tensor:
        known = ~torch.isnan(b["y"])
        filled = torch.where(known, b["y"], torch.zeros_like(b["y"]))
        off = torch.where(known, m(b["x"]) - filled, torch.zeros(()))
        return off.square().sum() / known.sum()

    return mlp(8, 16, 3), {"x": torch.randn(16, 8), "y": target}, loss


@ordinary
def safe_log_by_where() -> Made:
    def loss(m: Any, b: Any) -> torch.Tensor:
        rate = F.softplus(m(b["x"])).squeeze(-1)
        safe = torch.where(b["y"] > 0, b["y"], torch.ones_like(b["y"]))
        return (rate - b["y"] * torch.log(rate + 1e-6) + b["y"] * torch.log(safe)).mean()

    return mlp(8, 16, 1), {"x": torch.randn(16, 8), "y": torch.poisson(torch.full((16,), 1.0))}, loss


@ordinary
def actor_critic() -> Made:
    model = Named(body=mlp(6, 32, 32, act=nn.Tanh), policy=nn.Linear(32, 4), value=nn.Linear(32, 1))

    def loss(m: Any, b: Any) -> torch.Tensor:
        h = torch.tanh(m.body(b["x"]))
        said = torch.distributions.Categorical(logits=m.policy(h))
        ratio = (said.log_prob(b["action"]) - b["old"]).exp()
        clipped = torch.min(ratio * b["advantage"], ratio.clamp(0.8, 1.2) * b["advantage"]).mean()
        return F.mse_loss(m.value(h).squeeze(-1), b["returns"]) - clipped - 0.01 * said.entropy().mean()

    batch = {"x": torch.randn(16, 6), "action": torch.randint(0, 4, (16,)), "old": -torch.rand(16) - 1,
             "advantage": torch.randn(16), "returns": torch.randn(16)}  # fmt: skip
    return model, batch, loss


@ordinary
def dqn_with_target_network() -> Made:
    online = mlp(6, 32, 4)
    model = Named(online=online, target=copy.deepcopy(online).requires_grad_(False))

    def loss(m: Any, b: Any) -> torch.Tensor:
        taken = m.online(b["x"]).gather(1, b["action"][:, None]).squeeze(1)
        with torch.no_grad():
            wanted = b["reward"] + 0.99 * m.target(b["next"]).max(1).values * (1 - b["done"])
        return F.smooth_l1_loss(taken, wanted)

    batch = {"x": torch.randn(16, 6), "next": torch.randn(16, 6), "action": torch.randint(0, 4, (16,)),
             "reward": torch.randn(16), "done": torch.randint(0, 2, (16,)).float()}  # fmt: skip
    return model, batch, loss


@ordinary
def sac_squashed_policy() -> Made:
    model = Named(policy=mlp(6, 32, 4), critic=mlp(8, 32, 1).requires_grad_(False))

    def loss(m: Any, b: Any) -> torch.Tensor:
        mean, log_std = m.policy(b["x"]).chunk(2, -1)
        normal = torch.distributions.Normal(mean, log_std.clamp(-5, 2).exp())
        raw = normal.rsample()
        action = torch.tanh(raw)
        log = (normal.log_prob(raw) - torch.log(1 - action.square() + 1e-6)).sum(-1)
        return (0.2 * log - m.critic(torch.cat([b["x"], action], -1)).squeeze(-1)).mean()

    return model, {"x": torch.randn(16, 6)}, loss


@ordinary
def mixture_density() -> Made:
    def loss(m: Any, b: Any) -> torch.Tensor:
        weight, mean, scale = m(b["x"]).chunk(3, -1)
        mixture = torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(logits=weight), torch.distributions.Normal(mean, F.softplus(scale) + 1e-3)
        )
        return -mixture.log_prob(b["y"]).mean()

    return mlp(4, 32, 15, act=nn.Tanh), {"x": torch.randn(16, 4), "y": torch.randn(16)}, loss


@ordinary
def physics_informed() -> Made:
    def loss(m: Any, b: Any) -> torch.Tensor:
        x = b["x"].clone().requires_grad_()
        u = m(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        return (bend + torch.sin(x)).square().mean() + m(torch.zeros(1, 1)).square().mean()

    return mlp(1, 16, 16, 1, act=nn.Tanh), {"x": torch.rand(16, 1) * 3}, loss


@ordinary
def two_headed_uncertainty() -> Made:
    model = Named(body=mlp(8, 24, 12), first=nn.Linear(12, 3), second=nn.Linear(12, 2))
    model.log_variances = nn.Parameter(torch.zeros(2))

    def loss(m: Any, b: Any) -> torch.Tensor:
        h = F.relu(m.body(b["x"]))
        losses = torch.stack([F.cross_entropy(m.first(h), b["y"]), F.mse_loss(m.second(h), b["t"])])
        return (losses * torch.exp(-m.log_variances) + m.log_variances).sum()

    return model, labelled() | {"t": torch.randn(16, 2)}, loss


@ordinary
def distillation() -> Made:
    model = Named(student=mlp(8, 16, 3), teacher=mlp(8, 64, 3).requires_grad_(False))

    def loss(m: Any, b: Any) -> torch.Tensor:
        out = m.student(b["x"])
        with torch.no_grad():
            soft = (m.teacher(b["x"]) / 4).softmax(-1)
        return F.kl_div((out / 4).log_softmax(-1), soft, reduction="batchmean") * 16 + F.cross_entropy(out, b["y"])

    return model, labelled(), loss


@ordinary
def sinkhorn_transport() -> Made:
    def loss(m: Any, b: Any) -> torch.Tensor:
        cost = torch.cdist(m(b["x"]), b["y"]).square()
        log = -cost / 0.5
        for _ in range(5):
            log = log - log.logsumexp(1, keepdim=True)
            log = log - log.logsumexp(0, keepdim=True)
        return (log.exp() * cost).sum() / len(cost)

    return mlp(4, 16, 4), {"x": torch.randn(8, 4), "y": torch.randn(8, 4)}, loss


@ordinary
def adversarial_domain() -> Made:
    """A domain classifier that reads the features and does not train them."""
    model = Named(body=mlp(8, 16, 8), label=nn.Linear(8, 3), domain=nn.Linear(8, 2))

    def loss(m: Any, b: Any) -> torch.Tensor:
        h = F.relu(m.body(b["x"]))
        return F.cross_entropy(m.label(h), b["y"]) + F.cross_entropy(m.domain(h.detach()), b["y"] % 2)

    loss.declared = {"stop_gradient": ("loss",)}  # type: ignore[attr-defined]
    return model, labelled(), loss
