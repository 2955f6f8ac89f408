"""Adam and its kin: bias-corrected first moments over a second moment or an infinity norm."""

from __future__ import annotations

from math import sqrt

import torch

from audits.updates.rules.base import (
    Options,
    Rule,
    State,
    advance,
    ascent,
    coupled,
    decayed,
    decoupled,
    kept,
    scalars_of,
)


def adam(theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Options) -> torch.Tensor:
    """Return ``-lr * m_hat / (sqrt(v_hat) + eps)``, with an L2 penalty's decay.

    ``m = b1 m + (1 - b1) g``, ``v = b2 v + (1 - b2) g^2``, ``m_hat = m / (1 - b1^t)``, ``v_hat = v / (1 - b2^t)``;
    amsgrad takes the running maximum of v.

    Reference: Kingma & Ba 2015; Reddi et al. 2018 (amsgrad). ``decoupled_weight_decay`` is `adamw`.
    """
    if options.get("decoupled_weight_decay"):
        return adamw(theta, gradient, state, options)
    return _adam_step(coupled(ascent(gradient, options), theta, options), state, options)


def adamw(theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Options) -> torch.Tensor:
    """Return Adam's step plus ``-lr * weight_decay * theta``.

    Reference: Loshchilov & Hutter 2019, Decoupled weight decay regularization, algorithm 2.
    """
    return _adam_step(ascent(gradient, options), state, options) + decoupled(theta, options)


def _adam_step(g: torch.Tensor, state: State, options: Options) -> torch.Tensor:
    scalars = scalars_of(options)
    beta1, beta2 = (float(beta) for beta in options["betas"])
    b1, b2 = scalars.beta(beta1), scalars.beta(beta2)
    t = advance(state)
    # In place on new tensors where the formula allows it: a model's weights are passed over many times here.
    state["exp_avg"] = m = (b1 * kept(state, "exp_avg", g)).add_(g, alpha=1.0 - b1)
    state["exp_avg_sq"] = v = (b2 * kept(state, "exp_avg_sq", g)).addcmul_(g, g, value=1.0 - b2)
    if options.get("amsgrad"):
        state["max_exp_avg_sq"] = v = torch.maximum(kept(state, "max_exp_avg_sq", g), v)
    denominator = (v / scalars.correction(beta2, t)).sqrt_().add_(float(options["eps"]))
    return (m / denominator).mul_(-float(options["lr"]) / scalars.correction(beta1, t))


def nadam(theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Options) -> torch.Tensor:
    """Return Adam's step with Nesterov momentum under a momentum schedule.

    ``mu_t = b1 (1 - 0.96^(t * momentum_decay) / 2)``, ``M = prod mu``;
    ``d = -lr [ (1 - mu_t) g / (1 - M_t) + mu_{t+1} m / (1 - M_t mu_{t+1}) ] / (sqrt(v_hat) + eps)``.

    Reference: Dozat 2016, Incorporating Nesterov momentum into Adam.
    """
    lr, psi = float(options["lr"]), float(options["momentum_decay"])
    b1, b2 = (float(beta) for beta in options["betas"])
    t = advance(state)
    g, shrink = decayed(ascent(gradient, options), theta, options, decouple=False)
    scalars = scalars_of(options)
    mu = b1 * (1.0 - 0.5 * scalars.power(0.96, t * psi))
    mu_next = b1 * (1.0 - 0.5 * scalars.power(0.96, (t + 1.0) * psi))
    state["mu_product"] = product = float(state.get("mu_product", 1.0)) * mu
    state["exp_avg"] = m = b1 * kept(state, "exp_avg", g) + (1.0 - b1) * g
    state["exp_avg_sq"] = v = b2 * kept(state, "exp_avg_sq", g) + (1.0 - b2) * g * g
    denominator = (v / scalars.correction(b2, t)).sqrt() + float(options["eps"])
    nesterov = (1.0 - mu) / (1.0 - product) * g + mu_next / (1.0 - product * mu_next) * m
    return -lr * nesterov / denominator + shrink


def radam(theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Options) -> torch.Tensor:
    """Return Adam's step, rectified; without the second moment while its variance is intractable (rho <= 5).

    ``rho_inf = 2 / (1 - b2) - 1``, ``rho = rho_inf - 2 t b2^t / (1 - b2^t)``;
    ``r^2 = (rho - 4)(rho - 2) rho_inf / ((rho_inf - 4)(rho_inf - 2) rho)``;
    ``d = -lr * m_hat * r * sqrt(1 - b2^t) / (sqrt(v) + eps)`` if rho > 5, else ``-lr * m_hat``.

    Reference: Liu et al. 2020, On the variance of the adaptive learning rate and beyond.
    """
    lr = float(options["lr"])
    b1, b2 = (float(beta) for beta in options["betas"])
    t = advance(state)
    g, shrink = decayed(ascent(gradient, options), theta, options, decouple=False)
    state["exp_avg"] = m = b1 * kept(state, "exp_avg", g) + (1.0 - b1) * g
    state["exp_avg_sq"] = v = b2 * kept(state, "exp_avg_sq", g) + (1.0 - b2) * g * g
    scalars = scalars_of(options)
    m_hat = m / scalars.correction(b1, t)
    rho_inf = 2.0 / (1.0 - b2) - 1.0
    # a small difference of large numbers: in float32 what is left of it has three digits
    taken = scalars.rounded(scalars.rounded(2.0 * t * scalars.power(b2, t)) / scalars.correction(b2, t))
    rho = scalars.rounded(scalars.rounded(rho_inf) - taken)
    if rho <= 5.0:
        return -lr * m_hat + shrink
    r = sqrt((rho - 4.0) * (rho - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho))
    return -lr * m_hat * r * sqrt(scalars.correction(b2, t)) / (v.sqrt() + float(options["eps"])) + shrink


def adamax(theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Options) -> torch.Tensor:
    """Return ``-lr / (1 - b1^t) * m / u`` with ``u = max(b2 u, |g| + eps)``.

    Reference: Kingma & Ba 2015, algorithm 2.
    """
    b1, b2 = (float(beta) for beta in options["betas"])
    t = advance(state)
    g = coupled(ascent(gradient, options), theta, options)
    state["exp_avg"] = m = b1 * kept(state, "exp_avg", g) + (1.0 - b1) * g
    state["exp_inf"] = u = torch.maximum(b2 * kept(state, "exp_inf", g), g.abs() + float(options["eps"]))
    return -float(options["lr"]) / scalars_of(options).correction(b1, t) * m / u


def sparse_adam(theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Options) -> torch.Tensor:
    """Return Adam's step on the rows that have a gradient; other rows and their moments stay.

    ``d_i = -lr * sqrt(1 - b2^t) / (1 - b1^t) * m_i / (sqrt(v_i) + eps)``: eps is added to the uncorrected root.

    Reference: documentation of torch.optim.SparseAdam (lazy Adam).
    """
    b1, b2 = (float(beta) for beta in options["betas"])
    t = advance(state)
    m, v = kept(state, "exp_avg", theta).clone(), kept(state, "exp_avg_sq", theta).clone()
    state["exp_avg"], state["exp_avg_sq"] = m, v
    update = torch.zeros_like(theta)
    gradient = gradient.coalesce()
    rows = tuple(gradient.indices())
    g = ascent(gradient.values(), options)
    m[rows] = b1 * m[rows] + (1.0 - b1) * g
    v[rows] = b2 * v[rows] + (1.0 - b2) * g * g
    scale = float(options["lr"]) * sqrt(1.0 - b2**t) / (1.0 - b1**t)
    update[rows] = -scale * m[rows] / (v[rows].sqrt() + float(options["eps"]))
    return update


_NO_MEMORY = {"betas": (0.0, 0.0)}
ADAM = Rule("Adam", adam, _NO_MEMORY)
ADAMW = Rule("AdamW", adamw, _NO_MEMORY)
#: torch keeps ``mu_product`` as a float32 scalar: in float64 weights the healthy worst is 1.6e-8 relative.
NADAM = Rule("NAdam", nadam, _NO_MEMORY, relative={torch.float64: 1e-6})
RADAM = Rule("RAdam", radam, {"betas": (0.0, 0.999)})
ADAMAX = Rule("Adamax", adamax, _NO_MEMORY)
SPARSE_ADAM = Rule("SparseAdam", sparse_adam, _NO_MEMORY, sparse=True, elementwise=False)
