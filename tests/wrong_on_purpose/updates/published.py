"""Published optimizers as a user would write them, each with mistakes to switch on; correct with ``mistake=""``.

State goes under names of their own, as in most code that is not torch's.
"""

from __future__ import annotations

from typing import Any

import torch

from tests.wrong_on_purpose.updates.optimizers import Own

Options = dict[str, Any]


class Lion(Own):
    defaults_of = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}
    mistakes = ("decay coupled", "averaged before the sign", "one beta for both", "sign missing")

    def move(self, p: torch.Tensor, g: torch.Tensor, state: Options, group: Options, index: int) -> None:
        wrong, (b1, b2) = group["mistake"], group["betas"]
        if wrong == "decay coupled":
            g = g + group["weight_decay"] * p
        else:
            p.mul_(1 - group["lr"] * group["weight_decay"])
        m = state.get("mean", torch.zeros_like(p))
        after = (b1 if wrong == "one beta for both" else b2) * m + (
            1 - (b1 if wrong == "one beta for both" else b2)
        ) * g
        c = after if wrong == "averaged before the sign" else b1 * m + (1 - b1) * g
        state["mean"] = after
        p.sub_(group["lr"] * (c if wrong == "sign missing" else c.sign()))


class LAMB(Own):
    defaults_of = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.1}
    mistakes = ("no trust ratio", "decay outside the ratio", "no bias correction", "ratio upside down")

    def move(self, p: torch.Tensor, g: torch.Tensor, state: Options, group: Options, index: int) -> None:
        wrong, t, (b1, b2) = group["mistake"], state["t"], group["betas"]
        m = state["m"] = b1 * state.get("m", torch.zeros_like(p)) + (1 - b1) * g
        v = state["v"] = b2 * state.get("v", torch.zeros_like(p)) + (1 - b2) * g * g
        first, second = (1.0, 1.0) if wrong == "no bias correction" else (1 - b1**t, 1 - b2**t)
        r = (m / first) / ((v / second).sqrt() + group["eps"])
        decay = group["weight_decay"] * p
        r = r if wrong == "decay outside the ratio" else r + decay
        weights, length = p.norm(), r.norm()
        ratio = length / weights if wrong == "ratio upside down" else weights / length
        if wrong == "no trust ratio" or not weights or not length:
            ratio = torch.ones_like(weights)
        p.sub_(group["lr"] * (ratio * r + (decay if wrong == "decay outside the ratio" else 0)))


class Adafactor(Own):
    """With the options that fairseq and transformers give it."""

    defaults_of = {
        "lr": None, "eps": (1e-30, 1e-3), "clip_threshold": 1.0, "decay_rate": -0.8, "beta1": None,
        "weight_decay": 0.0, "scale_parameter": True, "relative_step": True, "warmup_init": False,
    }  # fmt: skip
    mistakes = ("not clipped", "columns ignored", "scale of the weights ignored", "decay rate constant")

    def move(self, p: torch.Tensor, g: torch.Tensor, state: Options, group: Options, index: int) -> None:
        wrong, t, weights = group["mistake"], state["t"], p
        if p.dtype in (torch.bfloat16, torch.float16):  # as published: float32 inside, rounded once
            weights, g = p.float(), g.float()
        rho = min(1e-2, t**-0.5)
        scale = max(group["eps"][1], float(weights.pow(2).mean().sqrt()))
        alpha = rho if wrong == "scale of the weights ignored" else rho * scale
        beta = 0.5 if wrong == "decay rate constant" else 1 - t ** group["decay_rate"]
        square = g * g + group["eps"][0]
        if g.dim() > 1:
            rows, columns = square.mean(-1), square.mean(-2)
            r = state["r"] = beta * state.get("r", torch.zeros_like(rows)) + (1 - beta) * rows
            c = state["c"] = beta * state.get("c", torch.zeros_like(columns)) + (1 - beta) * columns
            v = r[..., None] * c[..., None, :] / r.mean(-1)[..., None, None]
            v = r[..., None].expand_as(v) if wrong == "columns ignored" else v
        else:
            v = state["v"] = beta * state.get("v", torch.zeros_like(square)) + (1 - beta) * square
        u = g / v.sqrt()
        if wrong != "not clipped":
            u = u / max(1.0, float(u.pow(2).mean().sqrt()) / group["clip_threshold"])
        p.copy_(weights - alpha * u)


class AdamWScheduleFree(Own):
    defaults_of = {
        "lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "warmup_steps": 0, "r": 0.0,
        "weight_lr_power": 2.0,
    }  # fmt: skip
    mistakes = ("not averaged", "beta ignored", "decay missing", "no bias correction", "z follows y")

    def move(self, p: torch.Tensor, g: torch.Tensor, state: Options, group: Options, index: int) -> None:
        wrong, t, lr, (b1, b2) = group["mistake"], state["t"], group["lr"], group["betas"]
        z = state.get("z", p.clone())
        v = state["v"] = b2 * state.get("v", torch.zeros_like(p)) + (1 - b2) * g * g
        total = state["total"] = state.get("total", 0.0) + lr ** group["weight_lr_power"]
        c = 0.0 if wrong == "not averaged" else lr ** group["weight_lr_power"] / total
        step = g / ((v / (1.0 if wrong == "no bias correction" else 1 - b2**t)).sqrt() + group["eps"])
        step = step if wrong == "decay missing" else step + group["weight_decay"] * p
        beta = 0.0 if wrong == "beta ignored" else b1
        p.copy_((1 - c) * p + c * z + lr * (beta * (1 - c) - 1) * step)
        state["z"] = p.clone() if wrong == "z follows y" else z - lr * step


class Muon(Own):
    """As its author publishes it: matrices alone, the iteration in bfloat16."""

    defaults_of = {"lr": 0.02, "weight_decay": 0.5, "momentum": 0.95}
    mistakes = ("not orthogonalised", "decay missing", "shape not scaled")

    def move(self, p: torch.Tensor, g: torch.Tensor, state: Options, group: Options, index: int) -> None:
        wrong, momentum, lr = group["mistake"], group["momentum"], group["lr"]
        b = state["velocity"] = momentum * state.get("velocity", torch.zeros_like(p)) + (1 - momentum) * g
        step = (1 - momentum) * g + momentum * b
        x = (step.T if p.shape[0] > p.shape[1] else step).bfloat16()
        x = x / (x.norm() + 1e-7)
        for _ in range(0 if wrong == "not orthogonalised" else 5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        x = (x.T if p.shape[0] > p.shape[1] else x).to(p.dtype)
        if wrong != "decay missing":
            p.mul_(1 - lr * group["weight_decay"])
        p.sub_(lr * (1 if wrong == "shape not scaled" else max(1, p.shape[0] / p.shape[1]) ** 0.5) * x)


class AdEMAMix(Own):
    defaults_of = {"lr": 1e-3, "betas": (0.9, 0.999, 0.9999), "alpha": 5.0, "eps": 1e-8, "weight_decay": 0.1}
    mistakes = ("slow average corrected", "alpha ignored", "decay coupled", "fast average not corrected")

    def move(self, p: torch.Tensor, g: torch.Tensor, state: Options, group: Options, index: int) -> None:
        wrong, t, (b1, b2, b3) = group["mistake"], state["t"], group["betas"]
        if wrong == "decay coupled":
            g = g + group["weight_decay"] * p
        fast = state["fast"] = b1 * state.get("fast", torch.zeros_like(p)) + (1 - b1) * g
        slow = state["slow"] = b3 * state.get("slow", torch.zeros_like(p)) + (1 - b3) * g
        v = state["v"] = b2 * state.get("v", torch.zeros_like(p)) + (1 - b2) * g * g
        slow = slow / (1 - b3**t) if wrong == "slow average corrected" else slow
        fast = fast if wrong == "fast average not corrected" else fast / (1 - b1**t)
        alpha = 0.0 if wrong == "alpha ignored" else group["alpha"]
        update = (fast + alpha * slow) / ((v / (1 - b2**t)).sqrt() + group["eps"])
        if wrong != "decay coupled":
            update = update + group["weight_decay"] * p
        p.sub_(group["lr"] * update)


PUBLISHED = (Lion, LAMB, Adafactor, AdamWScheduleFree, Muon, AdEMAMix)
