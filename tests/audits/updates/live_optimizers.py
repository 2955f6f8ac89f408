"""Optimizers that are more than class, options and state, correct and wrong, and what people hook onto them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.first(x)))


def classify(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def subject(dtype: torch.dtype = torch.float32) -> tuple[Net, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return Net().to(dtype), {"x": torch.randn(8, 6, dtype=dtype), "y": torch.arange(8) % 3}


def trained(model: nn.Module, batch: Any, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        classify(model, batch).backward()
        optimizer.step()


def own_step(model: nn.Module, batch: Any, context: Any) -> None:
    context.optimizer.zero_grad()
    classify(model, batch).backward()
    context.optimizer.step()


def _each(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def clamps_weights(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    with torch.no_grad():
        for parameter in _each(optimizer):
            parameter.clamp_(-0.1, 0.1)


def takes_signs(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for parameter in _each(optimizer):
        if parameter.grad is not None:
            parameter.grad.sign_()


def clips(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    nn.utils.clip_grad_norm_(_each(optimizer), 0.05)


def forgets(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor) and value.dim():
                value.mul_(0.5)


@torch.no_grad()
def looks_on(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    optimizer.seen = getattr(optimizer, "seen", 0) + 1  # type: ignore[attr-defined]


class Flagged(torch.optim.AdamW):
    """AdamW; with ``coupled``, which is in neither defaults nor groups, its decay goes through the moments."""

    def __init__(self, params: Any, lr: float = 1e-3, *, coupled: bool, **options: Any) -> None:
        super().__init__(params, lr=lr, **options)
        self.coupled = coupled

    def _init_group(self, group: Any, *args: Any, **kwargs: Any) -> Any:
        if self.coupled:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.detach(), alpha=0.5)
        return super()._init_group(group, *args, **kwargs)


class Slotted(torch.optim.SGD):
    """SGD; ``factor`` lives in a slot, and only its required argument says what it is."""

    __slots__ = ("factor",)

    def __init__(self, params: Any, factor: float, /, **options: Any) -> None:
        super().__init__(params, **options)
        self.factor = factor

    @classmethod
    def plain(cls, params: Any, **options: Any) -> Slotted:
        return cls(params, 1.0, **options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        before = [p.clone() for p in _each(self)]
        super().step(closure)
        for parameter, old in zip(_each(self), before, strict=True):
            if self.factor != 1.0:
                parameter.copy_(old + (parameter - old) * self.factor)


class Private(torch.optim.Optimizer):
    """SGD with momentum that keeps its buffers beside ``state``, by parameter, by id, and a counter."""

    def __init__(self, params: Any, lr: float = 0.1, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": 0.0, "dampening": 0.0,
                                  "nesterov": False, "maximize": False})  # fmt: skip
        self.buffers: dict[torch.Tensor, torch.Tensor] = {}
        self.counts: dict[int, int] = {}
        self.taken = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.taken += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                self.counts[id(parameter)] = self.counts.get(id(parameter), 0) + 1
                assert self.counts[id(parameter)] <= self.taken
                if parameter in self.buffers:
                    self.buffers[parameter].mul_(group["momentum"]).add_(parameter.grad)
                else:
                    self.buffers[parameter] = parameter.grad.clone()
                parameter.sub_(self.buffers[parameter], alpha=group["lr"])

    def state_dict(self) -> Any:
        found = super().state_dict()
        found["private"] = ([self.buffers.get(p) for p in _each(self)], self.taken)
        return found

    def load_state_dict(self, state_dict: Any) -> None:
        buffers, self.taken = state_dict["private"]
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "private"})
        self.buffers = {p: b.clone() for p, b in zip(_each(self), buffers, strict=True) if b is not None}
        self.counts = {id(p): self.taken for p in self.buffers}


class Lost(Private):
    """The same, but ``state_dict`` leaves out what it keeps."""

    def state_dict(self) -> Any:
        return torch.optim.Optimizer.state_dict(self)

    def load_state_dict(self, state_dict: Any) -> None:
        torch.optim.Optimizer.load_state_dict(self, state_dict)


class Plain(torch.optim.AdamW):
    """A subclass that adds nothing."""


class Schedule:
    """What a constructor may make for itself."""

    def __init__(self, factor: float) -> None:
        self.factor = factor


class Made(torch.optim.SGD):
    """SGD whose constructor makes a function and an object, which no recipe can hold."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr=lr)
        self.schedule = Schedule(1.0)
        self.scaled = lambda value: value * self.schedule.factor

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(self.scaled(parameter.grad), alpha=group["lr"])
