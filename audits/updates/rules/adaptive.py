"""Rules with a step size per element: Adagrad, Adadelta, RMSprop, Rprop."""

from __future__ import annotations

import torch

from audits.updates.rules.base import Options, Rule, State, advance, ascent, coupled, kept


def adagrad(theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Options) -> torch.Tensor:
    """Return ``-lr / (1 + (t - 1) lr_decay) * g / (sqrt(sum g^2) + eps)``.

    The sum starts from ``initial_accumulator_value``.

    Reference: Duchi, Hazan & Singer 2011.
    """
    t = advance(state)
    g = coupled(ascent(gradient, options), theta, options)
    start = float(options.get("initial_accumulator_value") or 0.0)
    total: torch.Tensor = state.get("sum", torch.full_like(theta, start)) + g * g
    state["sum"] = total
    rate = float(options["lr"]) / (1.0 + (t - 1.0) * float(options.get("lr_decay") or 0.0))
    return -rate * g / (total.sqrt() + float(options["eps"]))


def adadelta(theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Options) -> torch.Tensor:
    """Return ``-lr * x`` with ``x = sqrt(E[x^2] + eps) / sqrt(E[g^2] + eps) * g``, means decaying with rho.

    Reference: Zeiler 2012, ADADELTA, algorithm 1.
    """
    advance(state)
    rho, eps = float(options["rho"]), float(options["eps"])
    g = coupled(ascent(gradient, options), theta, options)
    state["square_avg"] = square = rho * kept(state, "square_avg", g) + (1.0 - rho) * g * g
    accumulated = kept(state, "acc_delta", g)
    x = (accumulated + eps).sqrt() / (square + eps).sqrt() * g
    state["acc_delta"] = rho * accumulated + (1.0 - rho) * x * x
    return -float(options["lr"]) * x


def rmsprop(theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Options) -> torch.Tensor:
    """Return ``-lr * b`` with ``b = momentum * b + g / (sqrt(E[g^2] - E[g]^2) + eps)``; E[g] only when centered.

    Reference: Hinton 2012, lecture 6e; Graves 2013, eq. 38-45 (centered).
    """
    advance(state)
    alpha = float(options["alpha"])
    g = coupled(ascent(gradient, options), theta, options)
    state["square_avg"] = variance = alpha * kept(state, "square_avg", g) + (1.0 - alpha) * g * g
    if options.get("centered"):
        state["grad_avg"] = mean = alpha * kept(state, "grad_avg", g) + (1.0 - alpha) * g
        variance = variance - mean * mean
    step = g / (variance.sqrt() + float(options["eps"]))
    momentum = float(options.get("momentum") or 0.0)
    if momentum:
        state["momentum_buffer"] = step = momentum * kept(state, "momentum_buffer", g) + step
    return -float(options["lr"]) * step


def rprop(theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Options) -> torch.Tensor:
    """Return ``-sign(g) * size``: sizes grow while the sign stays and shrink when it flips, without a step then.

    Sizes start at lr (later changes of lr do nothing) and stay within ``step_sizes``.

    Reference: Riedmiller & Braun 1993, in the variant iRprop- of Igel & Huesken 2000.
    """
    advance(state)
    shrink, grow = (float(eta) for eta in options["etas"])
    smallest, largest = (float(size) for size in options["step_sizes"])
    g = ascent(gradient, options)
    agreement = g.sign() * kept(state, "prev", g).sign()
    factor = torch.ones_like(g)
    factor[agreement > 0] = grow
    factor[agreement < 0] = shrink
    before: torch.Tensor = state.get("step_size", torch.full_like(theta, float(options["lr"])))
    state["step_size"] = size = (before * factor).clamp(smallest, largest)
    state["prev"] = g = torch.where(agreement < 0, torch.zeros_like(g), g)
    return -g.sign() * size


ADAGRAD = Rule("Adagrad", adagrad, {})
ADADELTA = Rule("Adadelta", adadelta, {"rho": 0.0})
RMSPROP = Rule("RMSprop", rmsprop, {"momentum": 0.0})
RPROP = Rule("Rprop", rprop, {})
