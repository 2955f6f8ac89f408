"""Correct models whose forwards keep something in the model, or that hold a module or a parameter twice.

Each is ``b(act(a(x)))`` around what it keeps; with ``wrong=True`` the activation's backward is off by 1 %.
"""

from __future__ import annotations

import functools
import random
import warnings
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

FAMILIES: dict[str, type[Kept]] = {}

#: Wide enough for exact mode's batched evaluation.
WIDTH = 32


class _WrongTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (y,) = ctx.saved_tensors
        return 1.01 * gradient * (1 - y * y)


class Kept(nn.Module):
    def __init__(self, wrong: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 3)
        self.wrong = wrong
        self.extra()

    def __init_subclass__(cls, **_: Any) -> None:
        FAMILIES[cls.__name__] = cls

    def extra(self) -> None:
        pass

    def act(self, x: torch.Tensor) -> torch.Tensor:
        return _WrongTanh.apply(x) if self.wrong else torch.tanh(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.act(self.a(x)))


def frequencies(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(x.shape[1], dtype=torch.float32).cos()


class Act(nn.Module):
    def __init__(self, wrong: bool) -> None:
        super().__init__()
        self.wrong = wrong

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _WrongTanh.apply(x) if self.wrong else torch.tanh(x)


class TwoNames(Kept):
    def extra(self) -> None:
        self.net = nn.Sequential(self.a, Act(self.wrong), self.b)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class Siamese(Kept):
    def extra(self) -> None:
        self.left = self.right = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.left(x) + self.right(x.flip(1)))


class ListedThrice(Kept):
    def extra(self) -> None:
        self.layers = nn.ModuleList([nn.Linear(6, 6)] * 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).sin()
        return super().forward(x)


class TiedParameter(Kept):
    def extra(self) -> None:
        self.c = nn.Linear(6, WIDTH, bias=False)
        self.c.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.act(self.a(x) + self.c(x)))


class ParametrizedTwice(Kept):
    def extra(self) -> None:
        nn.utils.parametrizations.weight_norm(self.a)
        nn.utils.parametrizations.spectral_norm(self.b)
        self.net = nn.Sequential(self.a, Act(self.wrong), self.b)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class ScriptedTwice(Kept):
    def extra(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates it
            self.c = self.d = torch.jit.script(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.d(self.c(self.act(self.a(x)))))


class OwnSetattr(Kept):
    __slots__ = ("memo",)

    def extra(self) -> None:
        self.net = nn.Sequential(self.a, Act(self.wrong), self.b)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter) and name != "memo":
            raise TypeError(f"{name}: no tensors here")
        super().__setattr__(name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "memo"):
            object.__setattr__(self, "memo", frequencies(x))
        return self.net(x * self.memo)


class PlainTensor(Kept):
    def extra(self) -> None:
        self._scale, self.late = torch.tensor(0.5), None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.late = x.sum()
        return super().forward(x) * self._scale


class Features(Kept):
    def extra(self) -> None:
        self.features: dict[str, Any] = {}
        self.shapes: OrderedDict[str, Any] = OrderedDict(old=torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.features["last"] = self.act(self.a(x))
        self.shapes["last"] = x.shape
        self.shapes.move_to_end("old")
        return self.b(self.features["last"])


class Refilled(Kept):
    def extra(self) -> None:
        self.acts: list[Any] = [torch.ones(2)]
        self.seen: set[Any] = {torch.ones(2)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.acts.clear()
        self.seen.clear()
        self.acts += [self.act(self.a(x)), x]
        self.seen.add(x)
        return self.b(self.acts[0])


class KeyedCache(Kept):
    def extra(self) -> None:
        self._key: Any = None
        self._table: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._key != (x.shape, x.dtype):
            self._key, self._table = (x.shape, x.dtype), frequencies(x)
        return super().forward(x * self._table)


class GrownCache(Kept):
    def extra(self) -> None:
        self._longest = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._longest < x.shape[1]:
            self._longest, self._table = x.shape[1], frequencies(x)
        return super().forward(x * self._table)


class TupleCache(Kept):
    def extra(self) -> None:
        self._cache: tuple[Any, ...] = (None, [torch.zeros(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._cache[0] != x.shape:
            self._cache[1].append(frequencies(x))
            self._cache = (x.shape, [frequencies(x)])
        return super().forward(x * self._cache[1][-1])


class LazilyBuilt(Kept):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "_tables"):
            self._tables = {(x.shape[1],): frequencies(x)}
        return super().forward(x * self._tables[(x.shape[1],)])


class LazyRegistry(Kept):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "table"):
            self.register_buffer("table", frequencies(x), persistent=False)
            self.norm = nn.Identity()
            self.register_parameter("none", None)
        self.a.register_buffer("seen", x.detach())
        return super().forward(self.norm(x * self.table))


class ReplacedModule(Kept):
    def extra(self) -> None:
        self.inner = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.inner = nn.Hardtanh(-9, 9)
        return super().forward(self.inner(x))


class ClassCache(Kept):
    tables: dict[Any, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (x.shape[1], x.dtype) not in self.tables:
            self.tables[x.shape[1], x.dtype] = frequencies(x)
        return super().forward(x * self.tables[x.shape[1], x.dtype])


@functools.lru_cache
def _remembered(count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(count, dtype=torch.float32).cos().to(dtype)


class FunctionCache(Kept):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * _remembered(x.shape[1], x.dtype))


@dataclass
class Cache:
    layers: list[Any] = field(default_factory=list)
    steps: int = 0


class Slotted:
    __slots__ = ("filled", "value")

    def __init__(self) -> None:
        self.filled = False


class ObjectCache(Kept):
    def extra(self) -> None:
        self.cache, self.slotted = Cache(), Slotted()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.slotted.filled:
            self.slotted.filled, self.slotted.value = True, frequencies(x)
        entry = Cache()
        entry.layers = [self.act(self.a(x * self.slotted.value))]
        self.cache.layers.append(entry)
        self.cache.steps += 1
        return self.b(self.cache.layers[-1].layers[0]) * (1 + 0.1 * len(self.cache.layers))


class Counters(Kept):
    def extra(self) -> None:
        self.register_buffer("average", torch.zeros(WIDTH))
        self.recent: deque[Any] = deque([torch.zeros(())], maxlen=3)
        self.array, self.calls = np.zeros(2), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.act(self.a(x))
        with torch.no_grad():
            self.average.lerp_(hidden.mean(0), 0.1)
            self.recent.append(hidden.mean())
        self.calls += 1
        self.array += 1
        return self.b(hidden) * float(1 + self.calls + self.array[0])


class OwnGenerators(Kept):
    def extra(self) -> None:
        self.generator = torch.Generator().manual_seed(3)
        self.numpy, self.python = np.random.default_rng(1), random.Random(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(x.shape, generator=self.generator, dtype=x.dtype)
        return super().forward(x + 0.1 * noise) * float(1 + self.numpy.random() + self.python.random())


class HiddenModule(Kept):
    def extra(self) -> None:
        self.hidden = [nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)).requires_grad_(False)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + self.hidden[0](x.float()))


class OddTensors(Kept):
    def extra(self) -> None:
        self.expanded = torch.ones(1).expand(6)
        self.sparse, self.empty = torch.eye(6).to_sparse(), torch.zeros(0, 3)
        self.meta = torch.zeros(3, device="meta")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates it
            self.quantized = torch.quantize_per_tensor(torch.ones(3), 0.5, 0, torch.qint8)
        self.leaf = torch.ones(6, requires_grad=True)
        self.register_buffer("repeated", torch.ones(1, 1).expand(1, 6))
        with torch.inference_mode():
            self.inferred = torch.ones(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * self.expanded * self.repeated * self.leaf.detach() + self.inferred[0].item())


class InPlace(Kept):
    def extra(self) -> None:
        self.state = torch.zeros(8, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.state = self.state.to(x.dtype)
        self.state.detach_()
        self.state += self.act(self.a(x))
        return self.b(self.state)


class AddsHooks(Kept):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.a.weight.register_hook(lambda gradient: gradient * 1.0)
        self.b.register_forward_hook(lambda module, inputs, output: None)
        return super().forward(x)


class ChangesModes(Kept):
    def extra(self) -> None:
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.drop(self.act(self.a(x)))
        self.drop.eval()
        return self.b(hidden)


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {"x": torch.randn(8, 6, generator=generator), "y": torch.randint(0, 3, (8,), generator=generator)}
