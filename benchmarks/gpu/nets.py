"""CNN, LSTM, attention and atomics: healthy under every switch, and what a switch cannot explain."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from audits import Recipe
from benchmarks.gpu.running import Bench, Case, Found, LeftOutError, healthy, no_alarm, switches, wrong


class Last(nn.Module):
    """The last step of a recurrent net's output."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)[0][:, -1]


class Attending(nn.Module):
    """Causal attention of four heads between two projections."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.project, self.out, self.norm = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = self.project(self.norm(x)).view(batch, length, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return (x + self.out(attended.transpose(1, 2).flatten(2)))[:, -1]


def _cnn() -> tuple[nn.Module, tuple[int, ...]]:
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
              nn.Conv2d(32, 64, 3, padding=1, groups=2), nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
              nn.Linear(256, 10)]  # fmt: skip
    return nn.Sequential(*layers), (16, 3, 16, 16)


def _cnn1d() -> tuple[nn.Module, tuple[int, ...]]:
    return nn.Sequential(nn.Conv1d(8, 32, 5), nn.Tanh(), nn.Conv1d(32, 32, 5, dilation=2), nn.ReLU(), nn.Flatten(),
                         nn.Linear(640, 10)), (16, 8, 32)  # fmt: skip


def _cnn3d() -> tuple[nn.Module, tuple[int, ...]]:
    return nn.Sequential(nn.Conv3d(2, 16, 3), nn.SiLU(), nn.Flatten(), nn.Linear(16 * 216, 10)), (8, 2, 8, 8, 8)


def _transposed() -> tuple[nn.Module, tuple[int, ...]]:
    return nn.Sequential(nn.ConvTranspose2d(8, 16, 4, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(),
                         nn.Linear(16 * 256, 10)), (8, 8, 8, 8)  # fmt: skip


def _lstm() -> tuple[nn.Module, tuple[int, ...]]:
    return nn.Sequential(Last(nn.LSTM(16, 64, 2, batch_first=True)), nn.Linear(64, 10)), (8, 64, 16)


def _gru() -> tuple[nn.Module, tuple[int, ...]]:
    return nn.Sequential(Last(nn.GRU(16, 64, batch_first=True)), nn.Linear(64, 10)), (8, 64, 16)


def _attention() -> tuple[nn.Module, tuple[int, ...]]:
    return nn.Sequential(Attending(), nn.Linear(64, 10)), (8, 32, 64)


NETS: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "conv2d": _cnn, "conv1d": _cnn1d, "conv3d": _cnn3d, "transposed conv": _transposed, "lstm": _lstm, "gru": _gru,
    "attention": _attention,
}  # fmt: skip

#: How a user asks for precision: torch's defaults, the old names, the new ones, and none of it.
SWITCHES: dict[str, dict[str, Any]] = {
    "torch's defaults": {},
    "allow_tf32": {"cuda__matmul__allow_tf32": True},
    "fp32_precision tf32": {"cuda__matmul__fp32_precision": "tf32", "cudnn__conv__fp32_precision": "tf32"},
    "fp32_precision ieee": {"cudnn__conv__fp32_precision": "ieee", "cudnn__rnn__fp32_precision": "ieee"},
    "no cuDNN": {"cudnn__enabled": False},
}

#: Where everything is tried; the other nets run under torch's defaults and with TF32 allowed everywhere.
EVERYWHERE = ("conv2d", "lstm", "attention")


def subject(name: str, bench: Bench) -> tuple[nn.Module, Recipe]:
    """Return a net on the device and its recipe."""
    model, shape = NETS[name]()
    model.to(bench.device)
    batch = {"x": torch.randn(shape, device=bench.device), "y": torch.randint(0, 10, (shape[0],), device=bench.device)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(batch["x"]), batch["y"]).backward()
        optimizer.step()
    return model, Recipe.capture(model, batch=batch, loss="cross_entropy", optimizer=optimizer)


def _net(name: str, how: str, bench: Bench) -> Found:
    changes = SWITCHES[how]
    if any(path.endswith("fp32_precision") for path in changes) and not hasattr(torch.backends.cudnn, "conv"):
        raise LeftOutError("a torch before 2.9 has no such switch")
    enabled = torch.backends.cudnn.enabled
    try:
        with switches(**changes):
            report = bench.audit(*subject(name, bench))
    finally:
        torch.backends.cudnn.enabled = enabled
    coarse = sorted({row.dtype for row in report.rows if row.dtype and "(" in row.dtype})
    return healthy(report, note=f"{report.outcome} {' '.join(coarse)}")


class OwnLinear(torch.autograd.Function):
    """A linear layer by hand, whose float32 backward is 2 % too long; in float64 nothing is wrong with it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, weight = ctx.saved_tensors
        factor = 1.0 if gradient.dtype is torch.float64 else 1.02
        return factor * (gradient @ weight), factor * (gradient.T @ x)


class OwnSwish(torch.autograd.Function):
    """No product: its float32 backward is 1e-3 too long, which TF32 does not excuse."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return F.silu(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        factor = 1.0 if gradient.dtype is torch.float64 else 1.001
        return factor * gradient * (s + x * s * (1 - s)), None


class Handmade(nn.Module):
    def __init__(self, function: Any, width: int) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.randn(width, width) / width**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function.apply(x, self.weight)


def _native_fault(function: Any, bench: Bench) -> Found:
    model = nn.Sequential(nn.Linear(16, 32), Handmade(function, 32), nn.Linear(32, 10)).to(bench.device)
    batch = {"x": torch.randn(64, 16, device=bench.device), "y": torch.randint(0, 10, (64,), device=bench.device)}
    held = [p for n, p in model.named_parameters() if n != "1.weight" or function is OwnLinear]
    if function is OwnSwish:
        model[1].weight.requires_grad_(False)
    recipe = Recipe.capture(model, batch=batch, loss="cross_entropy", optimizer=torch.optim.SGD(held, lr=0.1))
    with switches(cuda__matmul__allow_tf32=True):
        report = bench.audit(model, recipe, checks=("gradient.native-dtype",))
    return wrong(report, check="gradient.native-dtype", named=function.__name__)


class Scattering(nn.Module):
    """Embedding, index_add and scatter: their CUDA backwards and forwards add in no fixed order."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.scale, self.head = nn.Embedding(50, 32), nn.Parameter(torch.ones(32)), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = self.table(x).flatten(0, 1)
        where = (torch.arange(seen.shape[0], device=x.device) * 7) % 16
        total = torch.zeros(16, 32, device=x.device, dtype=seen.dtype).index_add(0, where, seen * self.scale)
        spread = torch.zeros_like(total).scatter_add(0, where[:16, None].expand(16, 32), seen[:16])
        return self.head(F.gelu(total + spread)[: x.shape[0]])


def _atomics(dtype: torch.dtype, bench: Bench) -> Found:
    model = Scattering().to(bench.device, dtype)
    batch = bench.on_device({"x": torch.randint(0, 5, (16, 256)), "y": torch.randint(0, 10, (16,))})
    optimizer = torch.optim.AdamW(model.parameters())
    report = bench.audit(model, Recipe.capture(model, batch=batch, loss="cross_entropy", optimizer=optimizer))
    return healthy(report) if dtype is torch.float32 else no_alarm(report)


def _family(name: str, bench: Bench) -> Found:
    correct = importlib.import_module("benchmarks.models.correct")
    model, batch, loss = correct.FAMILIES[name]()
    model, batch = model.to(bench.device), bench.on_device(batch)
    correct.train(model, batch, loss)
    held = [p for p in model.parameters() if p.requires_grad]
    recipe = Recipe.capture(model, batch=batch, loss=loss, optimizer=torch.optim.SGD(held, lr=0.1))
    checks = ("gradient.finite-difference", "gradient.native-dtype")
    return no_alarm(bench.audit(model, recipe, method="probe", checks=checks))


#: Their forwards name the CPU.
_CPU_FAMILIES = ("tied_gpt", "autocast_inside")


def cases(bench: Bench) -> list[Case]:
    chosen = [("conv2d", "torch's defaults")] if bench.quick else [
        (name, how) for name in NETS for how in SWITCHES
        if name in EVERYWHERE or how in ("torch's defaults", "allow_tf32")
    ]  # fmt: skip
    found = [Case("net", f"{name}, {how}", functools.partial(_net, name, how)) for name, how in chosen]
    found += [
        Case("net", f"{function.__name__} wrong in float32 alone, TF32 allowed",
             functools.partial(_native_fault, function))
        for function in (OwnLinear, OwnSwish)
    ]  # fmt: skip
    dtypes = (torch.float32,) if bench.quick else (torch.float32, torch.bfloat16)
    found += [Case("atomics", str(dtype), functools.partial(_atomics, dtype)) for dtype in dtypes]
    return found


def family_cases(bench: Bench) -> list[Case]:
    names = list(importlib.import_module("benchmarks.models.correct").FAMILIES)
    names = [name for name in names if name not in _CPU_FAMILIES]
    return [Case("family", name, functools.partial(_family, name)) for name in (names[:3] if bench.quick else names)]
