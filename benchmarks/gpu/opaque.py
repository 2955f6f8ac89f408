"""Kernels that compute in float32 inside: right ones are resolved, wrong ones are found and named."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from audits import Recipe
from benchmarks.gpu.running import Bench, Case, Found, healthy, wrong

#: How the backward is wrong: the factor on its coupling, and the columns forgotten.
FAULTS = {"coupling x 0.9": (0.9, 0), "coupling dropped": (0.0, 0), "last 8 columns forgotten": (1.0, 8)}

PRECISIONS = ("float32", "bfloat16 weights", "bf16-autocast")


class Rms(nn.Module):
    def __init__(self, function: Any, width: int) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(1 + 0.1 * torch.randn(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function.apply(x, self.weight)


class Block(nn.Module):
    def __init__(self, function: Any, width: int) -> None:
        super().__init__()
        self.n1, self.n2 = Rms(function, width), Rms(function, width)
        self.mix, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.out(torch.tanh(self.mix(self.n1(x))))
        return x + self.down(F.gelu(self.up(self.n2(x))))


class Net(nn.Module):
    """Tokens, two blocks with a norm of the given Function twice each, a head."""

    def __init__(self, function: Any, width: int = 64, vocabulary: int = 97) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.b = nn.Sequential(Block(function, width), Block(function, width))
        self.norm, self.head = Rms(function, width), nn.Linear(width, vocabulary)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.b(self.embed(x))))


def token_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch["x"]).flatten(0, 1).float(), batch["y"].flatten())


def subject(function: Any, precision: str, device: str) -> tuple[nn.Module, Recipe]:
    """Return a net of the Function on the device and its recipe."""
    model = Net(function).to(device)
    if precision == "bfloat16 weights":
        model.to(torch.bfloat16)
    batch = {"x": torch.randint(0, 97, (8, 16), device=device), "y": torch.randint(0, 97, (8, 16), device=device)}
    optimizer = torch.optim.AdamW(model.parameters())
    chosen = precision if "autocast" in precision else "native"
    return model, Recipe.capture(model, batch=batch, loss=token_loss, optimizer=optimizer, precision=chosen)


def _function(kind: str, coupling: float = 1.0, forgotten: int = 0) -> Any:
    if kind == "numpy":
        from benchmarks.gpu.numpy_rms import rms_function

        return rms_function(coupling, forgotten)
    from benchmarks.gpu.triton_rms import TritonRms, wrong_rms

    return TritonRms if (coupling, forgotten) == (1.0, 0) else wrong_rms(coupling, forgotten)


def _right(kind: str, precision: str, bench: Bench) -> Found:
    report = bench.audit(*subject(_function(kind), precision, bench.device))
    limits = [r.detection_limit for r in report.rows if r.check == "gradient.finite-difference" and r.detection_limit]
    return healthy(report, note=f"{report.outcome}, coverage {report.coverage:.2f}, limits to {max(limits):.1e}")


def _wrong(kind: str, precision: str, fault: str, bench: Bench) -> Found:
    model, recipe = subject(_function(kind, *FAULTS[fault]), precision, bench.device)
    report = bench.audit(model, recipe, checks=("gradient.*", "audit.completed"))
    return wrong(report, check="gradient.finite-difference", named="Rms")


def cases(bench: Bench) -> list[Case]:
    found = []
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own way of running without a GPU
    for kind, needs, cuda in (("triton", ("triton",), not interpreted), ("numpy", (), False)):
        for precision in PRECISIONS[:1] if bench.quick else PRECISIONS:
            found.append(Case("opaque", f"{kind} RMSNorm right, {precision}",
                              functools.partial(_right, kind, precision), needs, cuda))  # fmt: skip
            found += [Case("opaque", f"{kind} RMSNorm {fault}, {precision}",
                           functools.partial(_wrong, kind, precision, fault), needs, cuda)
                      for fault in FAULTS]  # fmt: skip
    return found
