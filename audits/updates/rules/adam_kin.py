"""Published kin of Adam: AdaBelief, Adan, AdEMAMix, Yogi, StableAdamW, QHAdam, ADOPT, AdaBound, RAdam."""

from __future__ import annotations

import math

import torch

from audits.updates.rules.base import PACKAGE, Options, Rule, State, ascent, average, count, decayed, kept, refuse

#: pytorch_optimizer adds this to the second moment under the root where it can take the largest one so far.
UNDER_THE_ROOT = 1e-15


def adabelief(theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Options) -> torch.Tensor:
    """Return Adam's step with ``s = b2 s + (1 - b2) (g - m)^2 + eps`` in the place of the second moment.

    Reference: Zhuang et al. 2020, AdaBelief optimizer: adapting stepsizes by the belief in observed gradients.
    """
    refuse(options, "amsgrad")
    b1, b2 = (float(beta) for beta in options["betas"])
    eps, t = float(options["eps"]), count(state, options)
    g, shrink = decayed(ascent(gradient, options), theta, options, decouple=True)
    m = average(state, "exp_avg", b1, g)
    state["exp_avg_var"] = s = b2 * kept(state, "exp_avg_var", g) + (1.0 - b2) * (g - m).square() + eps
    update: torch.Tensor = shrink - float(options["lr"]) / (1.0 - b1**t) * m / ((s / (1.0 - b2**t)).sqrt() + eps)
    return update


def adan(theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Options) -> torch.Tensor:
    """Return ``-lr (m_hat + b2 v_hat) / (sqrt(n_hat) + eps)`` under a proximal decay.

    m averages g, v averages ``g - g_before``, n averages ``(g + b2 (g - g_before))^2``; the weights are divided by
    ``1 + lr * weight_decay`` afterwards, or, decoupled, multiplied by ``1 - lr * weight_decay`` before.

    Reference: Xie et al. 2022, Adan: adaptive Nesterov momentum algorithm, algorithm 1.
    """
    refuse(options, "max_grad_norm")  # one factor from the gradients of all tensors
    b1, b2, b3 = (float(beta) for beta in options["betas"])
    lr, decay, t = float(options["lr"]), float(options.get("weight_decay") or 0.0), count(state, options)
    g = ascent(gradient, options)
    change = g + state.get("previous_grad", -g)
    state["previous_grad"] = -g
    m = average(state, "exp_avg", b1, g)
    v = average(state, "exp_avg_diff", b2, change)
    n = average(state, "exp_avg_sq", b3, (g + b2 * change).square())
    root = (n / (1.0 - b3**t)).sqrt() + float(options["eps"])
    step: torch.Tensor = -lr * (m / (1.0 - b1**t) + b2 * v / (1.0 - b2**t)) / root
    if options.get("weight_decouple", options.get("no_prox")):
        step = step - lr * decay * theta
    else:
        step = (theta + step) / (1.0 + lr * decay) - theta
    return step


def ademamix(theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Options) -> torch.Tensor:
    """Return ``-lr (m_hat + alpha m_slow) / (sqrt(v_hat) + eps) - lr * weight_decay * theta``.

    m_slow averages with ``b3`` and is not corrected; alpha and b3 warm up (``t_alpha_beta3``): alpha linearly, b3 with
    a half-life that grows linearly.

    Reference: Pagliardini et al. 2024, The AdEMAMix optimizer: better, faster, older, algorithm 1.
    """
    refuse(options, "alpha_warmup", "beta3_warmup")
    b1, b2, b3 = (float(beta) for beta in options["betas"])
    t, alpha = count(state, options), float(options["alpha"])
    if warm := options.get("t_alpha_beta3"):
        share = t / float(warm)
        alpha = min(share * alpha, alpha)
        one, slow = math.log(b1), math.log(b3)
        b3 = min(math.exp(one * slow / ((1.0 - share) * slow + share * one)), b3) if share < 1.0 else b3
    g, shrink = decayed(ascent(gradient, options), theta, options, decouple=True)
    m, slowly = average(state, "exp_avg", b1, g), average(state, "exp_avg_slow", b3, g)
    v = average(state, "exp_avg_sq", b2, g * g)
    root = (v / (1.0 - b2**t)).sqrt() + float(options["eps"])
    update: torch.Tensor = shrink - float(options["lr"]) * (m / (1.0 - b1**t) + alpha * slowly) / root
    return update


def yogi(theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Options) -> torch.Tensor:
    """Return Adam's step with ``v = v - (1 - b2) sign(v - g^2) g^2``; both moments start at ``initial_accumulator``.

    Reference: Zaheer et al. 2018, Adaptive methods for nonconvex optimization, algorithm 2.
    """
    refuse(options)
    b1, b2 = (float(beta) for beta in options["betas"])
    t = count(state, options)
    g, shrink = decayed(ascent(gradient, options), theta, options, decouple=False)
    start = torch.full_like(g, float(options["initial_accumulator"]))
    state["exp_avg"] = m = b1 * state.get("exp_avg", start) + (1.0 - b1) * g
    v = state.get("exp_avg_sq", start)
    state["exp_avg_sq"] = v = v - (1.0 - b2) * (v - g * g).sign() * g * g
    update: torch.Tensor = shrink - float(options["lr"]) / (1.0 - b1**t) * m / (
        (v / (1.0 - b2**t)).sqrt() + float(options["eps"])
    )
    return update


def stable_adamw(theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Options) -> torch.Tensor:
    """Return AdamW's step at ``lr / max(1, rms(g / sqrt(max(v, eps^2))))``, decay included.

    The bias is corrected in the averages: ``beta_hat = beta (1 - beta^(t-1)) / (1 - beta^t)``.

    Reference: Wortsman et al. 2023, Stable and low-precision training for large-scale vision-language models.
    """
    refuse(options)
    t, eps = count(state, options), float(options["eps"])
    b1, b2 = (float(beta) * (1.0 - float(beta) ** (t - 1.0)) / (1.0 - float(beta) ** t) for beta in options["betas"])
    coupled = not options.get("weight_decouple", True)
    g = ascent(gradient, options)
    g = decayed(g, theta, options, decouple=True)[0] if coupled else g
    m, v = average(state, "exp_avg", b1, g), average(state, "exp_avg_sq", b2, g * g)
    lr = float(options["lr"]) / max(1.0, float((g.square() / v.clamp(min=eps**2)).mean().sqrt()))
    shrink = torch.zeros_like(theta) if coupled else decayed(g, theta, options, decouple=True, lr=lr)[1]
    return shrink - lr * m / (v.sqrt() + eps)


def qhadam(theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Options) -> torch.Tensor:
    """Return ``-lr (nu1 m + (1 - nu1) g) / (sqrt(nu2 v + (1 - nu2) g^2) + eps)``, m and v corrected averages.

    Reference: Ma & Yarats 2019, Quasi-hyperbolic momentum and Adam for deep learning, algorithm 2.
    """
    refuse(options)
    b1, b2 = (float(beta) for beta in options["betas"])
    nu1, nu2 = (float(nu) for nu in options["nus"])
    g, shrink = decayed(ascent(gradient, options), theta, options, decouple=False)
    for key, beta, mean, value in (("beta1_weight", b1, "exp_avg", g), ("beta2_weight", b2, "exp_avg_sq", g * g)):
        state[key] = beta * state.get(key, torch.zeros(1, dtype=g.dtype, device=g.device)) + 1.0
        share = 1.0 / state[key]
        if options.get(PACKAGE) == "pytorch_optimizer":
            share = (1.0 / state[key].float()).double()  # kept in float32; two means nearly cancel in the update
        old = kept(state, mean, g)
        state[mean] = old + (value - old) * share
    first, second = nu1 * state["exp_avg"] + (1.0 - nu1) * g, nu2 * state["exp_avg_sq"] + (1.0 - nu2) * g * g
    update: torch.Tensor = shrink - float(options["lr"]) * first / (second.sqrt() + float(options["eps"]))
    return update


def adopt(theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Options) -> torch.Tensor:
    """Return ``-lr * m`` with ``m = b1 m + (1 - b1) clip(g / max(sqrt(v), eps))``, v of the gradients before.

    The first step only sets ``v = g^2``. The clip at step t is ``(t - 1)^0.25``; pytorch_optimizer takes ``t^0.25``,
    and decays in the first step too.

    Reference: Taniguchi et al. 2024, ADOPT: modified Adam can converge with any beta2 with the optimal rate.
    """
    refuse(options)
    b1, b2 = (float(beta) for beta in options["betas"])
    t, own = count(state, options), options.get(PACKAGE) == "pytorch_optimizer"
    g, shrink = decayed(ascent(gradient, options), theta, options, decouple=bool(options.get("decouple")))
    v, m = kept(state, "exp_avg_sq", g), kept(state, "exp_avg", g)
    if t == 1.0:
        state["exp_avg_sq"], state["exp_avg"] = v + g * g, m
        return shrink if own else torch.zeros_like(theta)
    scaled = g / v.sqrt().clamp(min=float(options["eps"]))
    chosen = options.get("clip_lambda", lambda step: step**0.25)
    if chosen is not None:
        clip = float(chosen(t if own else t - 1.0))
        scaled = scaled.clamp(-clip, clip)
    state["exp_avg"] = m = b1 * m + (1.0 - b1) * scaled
    state["exp_avg_sq"] = b2 * v + (1.0 - b2) * g * g
    return shrink - float(options["lr"]) * m


def adabound(theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Options) -> torch.Tensor:
    """Return ``-clip(lr sqrt(1 - b2^t) / (1 - b1^t) / (sqrt(v) + eps), low, high) * m``.

    ``low, high = final_lr lr / lr_0 (1 -+ 1 / (gamma t (+ 1 below)))``, lr_0 the rate at the start.

    Reference: Luo et al. 2019, Adaptive gradient methods with dynamic bound of learning rate, algorithm 1.
    """
    refuse(options, "amsbound")
    b1, b2 = (float(beta) for beta in options["betas"])
    lr, gamma, t = float(options["lr"]), float(options["gamma"]), count(state, options)
    starts = set(options.get("base_lrs") or ())
    if len(starts) > 1:
        raise ValueError("groups that start from several rates: which is this one's is not in the group")
    start = float(next(iter(starts), options.get("initial_lr", lr)))
    g, shrink = decayed(ascent(gradient, options), theta, options, decouple=False)
    m, v = average(state, "exp_avg", b1, g), average(state, "exp_avg_sq", b2, g * g)
    inside = UNDER_THE_ROOT if options.get(PACKAGE) == "pytorch_optimizer" else 0.0
    rate = lr * math.sqrt(1.0 - b2**t) / (1.0 - b1**t) / ((v + inside).sqrt() + float(options["eps"]))
    final = float(options["final_lr"]) * lr / start if start else 0.0
    low, high = final * (1.0 - 1.0 / (gamma * t + 1.0)), final * (1.0 + 1.0 / (gamma * t))
    update: torch.Tensor = shrink - rate.clamp(low, high) * m
    return update


_NO_MEMORY = {"betas": (0.0, 0.0)}


def radam_published(theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Options) -> torch.Tensor:
    """Return ``-lr r m_hat / (sqrt(v) + eps)`` from ``rho_t >= n_sma_threshold`` on.

    ``rho_t = rho - 2 t b2^t / (1 - b2^t)``, ``rho = 2 / (1 - b2) - 1``;
    ``r = sqrt((1 - b2^t) (rho_t - 4) (rho_t - 2) rho / ((rho - 4) (rho - 2) rho_t))``. Before that the step is
    ``-lr m_hat`` with ``degenerated_to_sgd``, and none at all (no decay either) without.

    Reference: Liu et al. 2020, On the variance of the adaptive learning rate and beyond, and its authors' code.
    """
    refuse(options)
    threshold, degenerates = float(options["n_sma_threshold"]), bool(options["degenerated_to_sgd"])
    b1, b2 = (float(beta) for beta in options["betas"])
    t, lr = count(state, options), float(options["lr"])
    g, shrink = decayed(ascent(gradient, options), theta, options, decouple=True)
    m = average(state, "exp_avg", b1, g)
    v = average(state, "exp_avg_sq", b2, g * g)
    left = 1.0 - b2**t
    longest = 2.0 / (1.0 - b2) - 1.0
    rho = longest - 2.0 * t * b2**t / left
    rate = lr / (1.0 - b1**t)
    if rho >= threshold:
        r = math.sqrt(left * (rho - 4.0) * (rho - 2.0) * longest / ((longest - 4.0) * (longest - 2.0) * rho))
        update: torch.Tensor = shrink - rate * r * m / (v.sqrt() + float(options["eps"]))
    else:
        update = shrink - rate * m if degenerates else torch.zeros_like(theta)
    return update


ADABELIEF = Rule("AdaBelief", adabelief, _NO_MEMORY)
ADAN = Rule("Adan", adan, {})
ADEMAMIX = Rule("AdEMAMix", ademamix, {"alpha": 0.0})
YOGI = Rule("Yogi", yogi, {}, signs=True)
STABLE_ADAMW = Rule("StableAdamW", stable_adamw, _NO_MEMORY, elementwise=False)
QHADAM = Rule("QHAdam", qhadam, _NO_MEMORY)
ADOPT = Rule("ADOPT", adopt, {})
ADABOUND = Rule("AdaBound", adabound, _NO_MEMORY)
RADAM_PUBLISHED = Rule("RAdam", radam_published, {}, marks=("n_sma_threshold", "degenerated_to_sgd"))
