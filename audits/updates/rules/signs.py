"""Rules whose update is a sign: Lion, Tiger, and the sign of a momentum."""

from __future__ import annotations

import torch

from audits.updates.rules.base import Options, Rule, State, ascent, average, decayed, kept, refuse


def lion(theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Options) -> torch.Tensor:
    """Return ``-lr * sign(b1 m + (1 - b1) g) - lr * weight_decay * theta``; then ``m = b2 m + (1 - b2) g``.

    lion-pytorch's ``decoupled_weight_decay`` divides the decay by the rate that the optimizer was made with.

    Reference: Chen et al. 2023, Symbolic discovery of optimization algorithms, program 1.
    """
    refuse(options)
    b1, b2 = (float(beta) for beta in options["betas"])
    if options.get("decoupled_wd"):
        options = {**options, "weight_decay": float(options["weight_decay"]) / float(options["_init_lr"])}
    g, shrink = decayed(ascent(gradient, options), theta, options, decouple=True)
    direction = (b1 * kept(state, "exp_avg", g) + (1.0 - b1) * g).sign()
    average(state, "exp_avg", b2, g)
    return shrink - float(options["lr"]) * direction


def tiger(theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Options) -> torch.Tensor:
    """Return ``-lr * sign(m) - lr * weight_decay * theta`` with ``m = beta m + (1 - beta) g``.

    Reference: Su 2023, Tiger: a tight-fisted optimizer.
    """
    refuse(options)
    g, shrink = decayed(ascent(gradient, options), theta, options, decouple=True)
    return shrink - float(options["lr"]) * average(state, "exp_avg", float(options["beta"]), g).sign()


def sign_sgd(theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Options) -> torch.Tensor:
    """Return ``-lr * sign(m) - lr * weight_decay * theta``; m is the gradient, or its average (Signum).

    Reference: Bernstein et al. 2018, signSGD: compressed optimisation for non-convex problems.
    """
    refuse(options)
    g, shrink = decayed(ascent(gradient, options), theta, options, decouple=True)
    momentum = float(options["momentum"])
    mean = average(state, "momentum_buffer", momentum, g) if momentum else g
    return shrink - float(options["lr"]) * mean.sign()


LION = Rule("Lion", lion, {"betas": (0.0, 0.0)}, signs=True)
TIGER = Rule("Tiger", tiger, {"beta": 0.0}, signs=True)
SIGN_SGD = Rule("SignSGD", sign_sgd, {"momentum": 0.0}, signs=True)
