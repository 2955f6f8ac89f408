"""Rules that walk one sequence of weights and train at another: Schedule-Free SGD and AdamW, MADGRAD; and SGDW."""

from __future__ import annotations

import math

import torch

from audits.updates.rules.adam_kin import UNDER_THE_ROOT
from audits.updates.rules.base import (
    PACKAGE,
    Options,
    Rule,
    State,
    advance,
    ascent,
    average,
    count,
    decayed,
    kept,
    refuse,
    running,
)
from audits.updates.rules.sgd import sgd


def _schedule_free(
    theta: torch.Tensor, step: torch.Tensor, state: State, options: Options, t: float, beta: float
) -> torch.Tensor:
    """Move y (the weights in training) towards z, and both along ``step``, as algorithm 1 does.

    ``y' = (1 - c) y + c z + lr (beta (1 - c) - 1) step``, ``z' = z - lr step``;
    ``c = w_t / sum w``, ``w_t = t^r max(lr)^p`` (p is ``weight_lr_power``).

    Reference: Defazio et al. 2024, The road less scheduled.
    """
    warmup = float(options["warmup_steps"])
    lr = float(options["lr"]) * (t / warmup if t < warmup else 1.0)
    state["lr_max"] = largest = max(lr, running(state, options, "lr_max", -1.0))
    weight = t ** float(options["r"]) * largest ** float(options["weight_lr_power"])
    state["weight_sum"] = total = running(state, options, "weight_sum", 0.0) + weight
    c = weight / total if total else 0.0
    z = state.get("z", theta)
    state["z"] = z - lr * step
    update: torch.Tensor = c * (z - theta) + lr * (beta * (1.0 - c) - 1.0) * step
    return update


def schedule_free_sgd(theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Options) -> torch.Tensor:
    """Return the update of y along ``g + weight_decay * y``; see `_schedule_free`."""
    refuse(options)
    t = count(state, options)
    g = ascent(gradient, options) + float(options["weight_decay"]) * theta
    return _schedule_free(theta, g, state, options, t, float(options["momentum"]))


def schedule_free_adamw(theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Options) -> torch.Tensor:
    """Return the update of y along ``g / (sqrt(v_hat) + eps) + weight_decay * y``; see `_schedule_free`."""
    refuse(options, "decoupling_c")
    t = count(state, options)
    b1, b2 = (float(beta) for beta in options["betas"])
    g = ascent(gradient, options)
    v = average(state, "exp_avg_sq", b2, g * g)
    inside = UNDER_THE_ROOT if options.get(PACKAGE) == "pytorch_optimizer" else 0.0
    step = g / ((v / (1.0 - b2**t) + inside).sqrt() + float(options["eps"])) + float(options["weight_decay"]) * theta
    return _schedule_free(theta, step, state, options, t, b1)


def madgrad(theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Options) -> torch.Tensor:
    """Return ``(1 - momentum) (z - theta)`` with ``z = x0 - s / (v^(1/3) + eps)``.

    ``lambda = (lr + eps) sqrt(t)``; ``s = s + lambda g``, ``v = v + lambda g^2``; x0 is where training began, and
    without momentum ``theta + s / (v^(1/3) + eps)``.

    Reference: Defazio & Jelassi 2021, Adaptivity without compromise, algorithm 1.
    """
    refuse(options)
    eps, momentum = float(options["eps"]), float(options["momentum"])
    t = advance(state)  # a "step" in the group stays 0: the count is one for all groups, beside the parameters' state
    lr = float(options["lr"]) + eps if options["lr"] else 0.0
    g, shrink = decayed(ascent(gradient, options), theta, {**options, "lr": lr}, decouple=False)
    v, s = kept(state, "grad_sum_sq", g), kept(state, "s", g)
    start = state.get("x0", theta) if momentum else theta + s / (v.pow(1.0 / 3.0) + eps)
    weight = lr * math.sqrt(t)
    state["s"], state["grad_sum_sq"] = s, v = s + weight * g, v + weight * g * g
    if momentum:
        state["x0"] = start
    return (1.0 - momentum) * (start - s / (v.pow(1.0 / 3.0) + eps) - theta) + shrink


def madgrad_inside(theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Options) -> float:
    """Return the rms of ``s / (v^(1/3) + eps)``: without momentum it is added to the weights and taken off again."""
    if float(options["momentum"]):
        return 0.0
    v, s = kept(state, "grad_sum_sq", gradient), kept(state, "s", gradient)
    return float((s / (v.pow(1.0 / 3.0) + float(options["eps"]))).square().mean().sqrt())


def sgdw(theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Options) -> torch.Tensor:
    """Return SGD's step plus ``-lr * weight_decay * theta``.

    Reference: Loshchilov & Hutter 2019, Decoupled weight decay regularization, algorithm 1.
    """
    refuse(options)
    g, shrink = decayed(ascent(gradient, options), theta, options, decouple=True)
    return sgd(theta, g, state, {**options, "weight_decay": 0.0, "maximize": False}) + shrink


SCHEDULE_FREE_SGD = Rule("Schedule-Free SGD", schedule_free_sgd, {"momentum": 0.0})
SCHEDULE_FREE_ADAMW = Rule("Schedule-Free AdamW", schedule_free_adamw, {})
MADGRAD = Rule("MADGRAD", madgrad, {"momentum": 0.0}, inside=madgrad_inside)
SGDW = Rule("SGDW", sgdw, {"momentum": 0.0, "nesterov": False})
