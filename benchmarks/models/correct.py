"""Families of correct models, each a function returning a model, a batch and a loss; and a short training of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Family = Callable[[], tuple[nn.Module, dict[str, Any], Any]]
FAMILIES: dict[str, Family] = {}


def family(make: Family) -> Family:
    FAMILIES[make.__name__] = make
    return make


def classes(n: int = 16, width: int = 8, kinds: int = 3) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(n, width), "y": torch.randint(0, kinds, (n,))}


def tokens() -> dict[str, torch.Tensor]:
    return {"x": torch.randint(0, 23, (3, 7)), "y": torch.randint(0, 23, (3, 7))}


def token_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch["x"]).flatten(0, 1), batch["y"].flatten())


@family
def relu_mlp():
    return (
        nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3)),
        classes(),
        "cross_entropy",
    )


@family
def activations_mlp():
    layers: list[nn.Module] = []
    for act in (nn.LeakyReLU(0.1), nn.PReLU(), nn.ELU(0.7), nn.SELU(), nn.Hardswish(), nn.Hardtanh(),
                nn.Softshrink(0.1), nn.GELU(), nn.Mish(), nn.RReLU(), nn.ReLU6()):  # fmt: skip
        layers += [nn.Linear(8, 8), act]
    return nn.Sequential(*layers, nn.Linear(8, 3)), classes(), "cross_entropy"


@family
def hardsigmoid_mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.Hardsigmoid(), nn.Linear(16, 3)), classes(), "cross_entropy"


@family
def pooled_cnn():
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.AdaptiveMaxPool2d(2), nn.Flatten(),
        nn.Dropout(0.3), nn.Linear(32, 5),
    )  # fmt: skip
    return model, {"x": torch.rand(6, 1, 8, 8), "y": torch.randint(0, 5, (6,))}, "cross_entropy"


@family
def batch_norm_eval_mixture():
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))
    model(torch.randn(64, 8))
    model[1].eval()
    return model, classes(), "cross_entropy"


class TiedGpt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(23, 16)
        self.block = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True, norm_first=True)
        self.head = nn.Linear(16, 23, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.head(self.block(self.embed(x), src_mask=mask, is_causal=True))


@family
def tied_gpt():
    return TiedGpt(), tokens(), token_loss


class RmsNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * y.to(x.dtype)


class Llama(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(23, 16)
        self.norms = nn.ModuleList(RmsNorm(16) for _ in range(3))
        self.qkv, self.out = nn.Linear(16, 48, bias=False), nn.Linear(16, 16, bias=False)
        self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 23)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x)
        q, k, v = self.qkv(self.norms[0](h)).view(*x.shape, 3, 2, 8).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2)).float() / 8**0.5
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), torch.finfo(scores.dtype).min)
        attended = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ v
        h = h + self.out(attended.transpose(1, 2).flatten(2))
        h = h + self.down(F.silu(self.gate(self.norms[1](h))) * self.up(self.norms[1](h)))
        return self.head(self.norms[2](h))


@family
def float32_norms():
    return Llama(), tokens(), token_loss


@family
def bfloat16_weights():
    return Llama().to(torch.bfloat16), tokens(), token_loss


class Vae(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(8, 8), nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 8))


def vae_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    mean, log_variance = model.encoder(batch["x"]).chunk(2, -1)
    z = mean + torch.randn_like(mean) * (log_variance / 2).exp()
    divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(-1).mean()
    return F.mse_loss(model.decoder(z), batch["x"]) + 0.1 * divergence


@family
def vae():
    return Vae(), {"x": torch.randn(16, 8)}, vae_loss


class LoraLinear(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, width) / 4), nn.Parameter(torch.zeros(width, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


@family
def lora_initial():
    return (
        nn.Sequential(*(m for _ in range(3) for m in (LoraLinear(8), nn.ReLU())), LoraLinear(8)),
        classes(),
        "cross_entropy",
    )


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = (
            nn.Embedding(23, 8),
            kind(8, 12, num_layers=2, dropout=0.2, batch_first=True),
            nn.Linear(12, 23),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(self.embed(x))[0])


@family
def lstm():
    return Recurrent(nn.LSTM), tokens(), token_loss


@family
def gru():
    return Recurrent(nn.GRU), tokens(), token_loss


@family
def spectral_and_weight_norm():
    norm = nn.utils.parametrizations
    model = nn.Sequential(
        norm.spectral_norm(nn.Linear(8, 16)), nn.LeakyReLU(0.2), norm.weight_norm(nn.Linear(16, 8)), nn.ReLU(),
        norm.orthogonal(nn.Linear(8, 8)), nn.Linear(8, 3),
    )  # fmt: skip
    return model, classes(), "cross_entropy"


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.head = nn.Linear(8, 4), nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, slots = torch.where(chosen == i)
            out.index_add_(0, rows, expert(x[rows]) * weights[rows, slots].unsqueeze(1))
        return self.head(out)


@family
def mixture_of_experts():
    return Experts(), classes(), "cross_entropy"


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 3)
        self.body = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 16))
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(checkpoint(self.body, self.first(x), use_reentrant=self.reentrant))


@family
def checkpoint_reentrant():
    return Checkpointed(True), classes(), "cross_entropy"


@family
def checkpoint_plain():
    return Checkpointed(False), classes(), "cross_entropy"


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sparse, self.limited = nn.Embedding(23, 6, sparse=True), nn.Embedding(23, 6, max_norm=1.5)
        self.bag, self.head = nn.EmbeddingBag(23, 6, mode="max"), nn.Linear(18, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat([self.sparse(x).mean(1), self.limited(x).amax(1), self.bag(x)], 1))


@family
def embeddings():
    return Bags(), {"x": torch.randint(0, 23, (6, 5)), "y": torch.randint(0, 3, (6,))}, "cross_entropy"


class Odd(nn.Module):
    """0-dim, empty, unused, complex and frozen parameters, in-place operations."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.empty = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.zeros(0, 3))
        self.unused, self.spectrum = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(5, dtype=torch.complex64))
        self.head = nn.Linear(8, 3)
        self.frozen = nn.Parameter(torch.randn(8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.fft.irfft(torch.fft.rfft(x) * self.spectrum, n=8)
        y = y.mul_(self.scale).add_(self.frozen).clamp_(-2, 2)
        return self.head(y.abs_())


@family
def odd_parameters():
    return Odd(), classes(), "cross_entropy"


def offset_loss(offset: float) -> Callable[[nn.Module, Any], torch.Tensor]:
    return lambda model, batch: F.cross_entropy(model(batch["x"]), batch["y"]) + offset


@family
def offset_1e4():
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)), classes(), offset_loss(1e4)


@family
def offset_1e9():
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)), classes(), offset_loss(1e9)


@family
def tiny_gradients():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    return model, classes(), lambda m, b: 1e-12 * F.cross_entropy(m(b["x"]), b["y"])


@family
def kinked_losses():
    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        out, t = model(batch["x"]), batch["t"]
        hinge = F.multi_margin_loss(out, batch["y"]) + F.relu(1 - out * t.sign()).mean()
        return hinge + F.huber_loss(out, t, delta=0.3) + F.smooth_l1_loss(out, t, beta=0.2) + F.l1_loss(out, t)

    batch = classes() | {"t": torch.randn(16, 3)}
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), batch, loss


class Teacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = nn.Linear(8, 4), nn.Linear(8, 4).requires_grad_(False)


@family
def teacher_without_gradients():
    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        with torch.no_grad():
            target = model.teacher(batch["x"])
        return F.mse_loss(model.student(batch["x"]), target)

    return Teacher(), {"x": torch.randn(16, 8)}, loss


@family
def gradient_penalty():
    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        x = batch["x"].detach().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return model(batch["x"]).mean() + (slope.norm(dim=1) - 1).square().mean()

    model = nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(0.2), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))
    return model, {"x": torch.randn(16, 8)}, loss


@family
def autocast_inside():
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                h = F.relu(self.first(x))
            return self.last(h.float())

    return Inner(), classes(), "cross_entropy"


@family
def converged_regression():
    x = torch.randn(16, 4)
    model = nn.Linear(4, 2)
    target = model(x).detach()
    return model, {"x": x, "y": target + 1e-6 * torch.randn(16, 2)}, lambda m, b: F.mse_loss(m(b["x"]), b["y"])


@family
def scripted():
    class Piece(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x) * torch.sigmoid(x) + 0.1 * x

    return nn.Sequential(nn.Linear(8, 16), torch.jit.script(Piece()), nn.Linear(16, 3)), classes(), "cross_entropy"


TRAINING_STEPS = 60


def train(model: nn.Module, batch: Any, loss: Any) -> None:
    from audits.recipe.callables import CallableReference, as_loss

    function = as_loss(CallableReference.of(loss, role="loss"))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    for _ in range(TRAINING_STEPS):
        optimizer.zero_grad()
        function(model, batch).backward()
        nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None and not p.grad.is_sparse], 1.0)
        optimizer.step()
