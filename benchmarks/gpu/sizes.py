"""Autocast, the loss scaler, and models of a size: time and peak memory."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from audits import Recipe
from benchmarks.gpu.opaque import token_loss
from benchmarks.gpu.running import Bench, Case, Found, LeftOutError, healthy, wrong


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(24, 64), nn.LayerNorm(64), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(F.gelu(self.norm(self.first(x))))


def _step(model: nn.Module, batch: Any, context: Any, *, early: bool) -> None:
    optimizer, scaler = context.optimizers["step"], context.scaler
    optimizer.zero_grad()
    with torch.autocast(batch["x"].device.type, torch.float16):
        loss = F.cross_entropy(model(batch["x"]), batch["y"])
    scaler.scale(loss).backward()
    if early:
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    scaler.unscale_(optimizer)
    if not early:
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    scaler.step(optimizer)
    scaler.update()


def right_step(model: nn.Module, batch: Any, context: Any) -> None:
    _step(model, batch, context, early=False)


def early_clip(model: nn.Module, batch: Any, context: Any) -> None:
    """Clips gradients that are still scaled."""
    _step(model, batch, context, early=True)


def _classifier(bench: Bench) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    model = Mlp().to(bench.device)
    return model, bench.on_device({"x": torch.randn(32, 24), "y": torch.randint(0, 10, (32,))})


def _autocast(precision: str, bench: Bench) -> Found:
    model, batch = _classifier(bench)
    optimizer = torch.optim.AdamW(model.parameters())
    recipe = Recipe.capture(model, batch=batch, loss="cross_entropy", optimizer=optimizer, precision=precision)
    return healthy(bench.audit(model, recipe))


def _scaled(step: Any, bench: Bench) -> Found:
    model, batch = _classifier(bench)
    recipe = Recipe.capture(
        model, batch=batch, loss="cross_entropy", optimizer=torch.optim.SGD(model.parameters(), lr=0.1), step=step,
        precision="fp16-autocast", clip_grad_norm=0.1,
    )  # fmt: skip
    report = bench.audit(model, recipe)
    return wrong(report, check="step.") if step is early_clip else healthy(report)


class Gpt2Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q, k, v = self.attention(self.ln_1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.projection(attended)
        return x + self.down(F.gelu(self.up(self.ln_2(x)), approximate="tanh"))


class Gpt2(nn.Module):
    """The layout of GPT-2: learned positions, tied head, 124 M parameters at its smallest published size."""

    def __init__(self, width: int, layers: int, heads: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Gpt2Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        return self.head(self.norm(self.blocks(h)))


class RmsNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        return self.weight * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


class LlamaBlock(nn.Module):
    def __init__(self, width: int, heads: int, shared: int, inner: int) -> None:
        super().__init__()
        self.heads, self.shared, self.size = heads, shared, width // heads
        self.n1, self.n2 = RmsNorm(width), RmsNorm(width)
        self.q, self.o = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k, self.v = (nn.Linear(width, shared * self.size, bias=False) for _ in range(2))
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        h = self.n1(x)
        q = self.q(h).view(batch, length, self.heads, self.size).transpose(1, 2)
        k, v = (f(h).view(batch, length, self.shared, self.size).transpose(1, 2) for f in (self.k, self.v))
        k, v = (t.repeat_interleave(self.heads // self.shared, 1) for t in (_turned(k), v))
        attended = F.scaled_dot_product_attention(_turned(q), k, v, is_causal=True)
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        h = self.n2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def _turned(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions."""
    half = x.shape[-1] // 2
    speed = 500000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)[:, None] * speed
    c, s = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * c - b * s, b * c + a * s], -1)


class Llama(nn.Module):
    """The layout of Llama: RMSNorm, rotary positions, shared keys, gated MLP, no biases."""

    def __init__(self, width: int, layers: int, heads: int, shared: int, inner: int, vocabulary: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*(LlamaBlock(width, heads, shared, inner) for _ in range(layers)))
        self.norm, self.head = RmsNorm(width), nn.Linear(width, vocabulary, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.blocks(self.embed(x))))


def _large(kind: str, bench: Bench) -> Found:
    if kind == "GPT-2 124 M float32":
        size = (64, 2, 4, 211, 64) if bench.quick else (768, 12, 12, 50257, 1024)
        with torch.device(bench.device):
            model: nn.Module = Gpt2(*size)
        rows, length, vocabulary = (2, 16, 211) if bench.quick else (4, 256, 50257)
    else:
        if bench.cuda and torch.cuda.get_device_properties(0).total_memory < 70 * 2**30:
            raise LeftOutError("needs 70 GiB of device memory")
        layout = (64, 2, 4, 2, 128, 211) if bench.quick else (2048, 16, 32, 8, 8192, 32000)
        with torch.device(bench.device):
            model = Llama(*layout).to(torch.bfloat16)
        rows, length, vocabulary = 1, 16 if bench.quick else 128, layout[-1]
    x = torch.randint(0, vocabulary, (rows, length + 1), device=bench.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=bench.cuda or None)
    batch = {"x": x[:, :-1], "y": x[:, 1:]}
    report = bench.audit(model, Recipe.capture(model, batch=batch, loss=token_loss, optimizer=optimizer))
    count = sum(p.numel() for p in model.parameters())
    per = f", {torch.cuda.max_memory_allocated() / count:.0f} bytes a parameter" if bench.cuda else ""
    return healthy(report, note=f"{report.outcome}, {count / 1e6:.0f} M, audit {report.seconds:.1f} s{per}")


def cases(bench: Bench) -> list[Case]:
    return [
        Case("precision", "bf16-autocast", functools.partial(_autocast, "bf16-autocast")),
        Case("precision", "fp16-autocast", functools.partial(_autocast, "fp16-autocast"), cuda=True),
        Case("precision", "fp16 scaler, clipped after unscaling", functools.partial(_scaled, right_step), cuda=True),
        Case("precision", "fp16 scaler, clipped before unscaling", functools.partial(_scaled, early_clip), cuda=True),
    ]


def size_cases(bench: Bench) -> list[Case]:
    return [Case("size", kind, functools.partial(_large, kind))
            for kind in ("GPT-2 124 M float32", "Llama layout 1 B bfloat16")]  # fmt: skip
