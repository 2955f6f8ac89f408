"""Models that are wrong on purpose, each at a line of its own, and a right one: what `gradaudit check` is tried on."""

from __future__ import annotations

import torch

from audits import Recipe


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):  # fault: backward
        return 2 * gradient


class Block(torch.nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer, self.kind = torch.nn.Linear(2, 2), kind

    def forward(self, x):  # fault: stop
        x = self.layer(x)
        if self.kind == "backward":
            x = Doubled.apply(x)
        return x.detach() + 0 * x if self.kind == "stop" else x


class FastSGD(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure=None):  # fault: optimizer
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=-2 * group["lr"])


def clipped_twice(model, batch, context):  # fault: step
    optimizer = context.optimizers["step"]
    optimizer.zero_grad()
    torch.nn.functional.mse_loss(model(batch["inputs"]), batch["targets"]).mul(2).backward()
    optimizer.step()


def build(kind, dtype=torch.float32):
    print("a model prints: this is no result")
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), Block(kind), torch.nn.Linear(2, 1)).to(dtype)
    optimizer = (FastSGD if kind == "optimizer" else torch.optim.SGD)(model.parameters(), lr=0.01)
    if kind == "lost":
        model[2] = torch.nn.Linear(2, 1).to(dtype)
    batch = {"inputs": torch.randn(4, 2, dtype=dtype), "targets": torch.randn(4, 1, dtype=dtype)}
    step = clipped_twice if kind == "step" else None
    return model, Recipe.capture(model, batch=batch, loss="mse_loss", optimizer=optimizer, step=step)


def audit_right():
    return build("right")


def audit_right64():
    return build("right", torch.float64)


def audit_backward():
    return build("backward")


def audit_backward64():
    return build("backward", torch.float64)


def audit_stop():
    return build("stop")


def audit_optimizer():
    return build("optimizer")


def audit_step():
    return build("step")


def audit_lost():  # fault: lost
    return build("lost")
