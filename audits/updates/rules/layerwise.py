"""Rules that scale each tensor's step by norms of the whole tensor: LAMB, LARS, NovoGrad."""

from __future__ import annotations

import torch

from audits.updates.rules.base import PACKAGE, Options, Rule, State, ascent, average, count, decayed, kept, refuse

#: The largest norm of weights that pytorch_optimizer's LAMB takes into its trust ratio.
LARGEST_NORM = 10.0


def lamb(theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Options) -> torch.Tensor:
    """Return ``-lr * r * |theta| / |r|`` with ``r = m_hat / (sqrt(v_hat) + eps) + weight_decay * theta``.

    The ratio is 1 where either norm is 0. ``trust_clip`` bounds it by 1; without ``always_adapt`` tensors that do not
    decay take it as 1. pytorch_optimizer corrects the first moment's bias alone, after the ratio, bounds the weights'
    norm by 10, adds eps to that of r, and decays the weights first (``weight_decouple``).

    Reference: You et al. 2020, Large batch optimization for deep learning: training BERT in 76 minutes, algorithm 2.
    """
    own = options.get(PACKAGE) == "pytorch_optimizer"
    # They divide by the norm of all gradients together.
    refuse(options, "pre_norm", *(() if own else ("max_grad_norm",)))
    b1, b2 = (float(beta) for beta in options["betas"])
    lr, eps, decay = float(options["lr"]), float(options["eps"]), float(options.get("weight_decay") or 0.0)
    t = count(state, options)
    g = ascent(gradient, options)
    taken = 1.0 - b1 if options.get("grad_averaging", True) else 1.0
    state["exp_avg"] = m = b1 * kept(state, "exp_avg", g) + taken * g
    v = average(state, "exp_avg_sq", b2, g * g)
    first = second = 1.0
    if own or options.get("bias_correction", True):
        first = 1.0 - b1**t
    if not own and options.get("bias_correction", True):
        second = 1.0 - b2**t
    shrink = torch.zeros_like(theta)
    outside = (own and options.get("weight_decouple", True)) or options.get("decoupled_decay")
    if outside:
        shrink = decayed(g, theta, {**options, "weight_decouple": True}, decouple=True)[1]
    moved = theta + shrink
    r = m / ((v / second).sqrt() + eps) / (1.0 if own else first)
    if not outside:
        r = r + decay * moved
    weights, length = float(moved.norm()), float(r.norm())
    weights = min(weights, LARGEST_NORM) if own else weights
    ratio = weights / (length + (eps if own else 0.0)) if weights and length else 1.0
    if options.get("trust_clip"):
        ratio = min(ratio, 1.0)
    if options.get("adam") or ("always_adapt" in options and not options["always_adapt"] and not decay):
        ratio = 1.0
    return shrink - lr * ratio / (first if own else 1.0) * r


def lars(theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Options) -> torch.Tensor:
    """Return SGD's step with momentum on ``c |theta| / (|g| + weight_decay |theta|) * (g + weight_decay * theta)``.

    c is ``trust_coefficient``; the ratio is 1 where a norm is 0. pytorch_optimizer leaves vectors as they are: no
    ratio, no decay.

    Reference: You et al. 2017, Large batch training of convolutional networks.
    """
    refuse(options, "eps")
    decay, momentum = float(options.get("weight_decay") or 0.0), float(options["momentum"])
    g = ascent(gradient, options)
    if g.dim() > 1 or options.get(PACKAGE) != "pytorch_optimizer":
        weights = float(theta.norm())
        rest = float(g.norm()) + decay * weights
        ratio = float(options["trust_coefficient"]) * weights / rest if weights and rest else 1.0
        g = ratio * (g + decay * theta)
    if momentum:
        dampening = float(options.get("dampening") or 0.0)
        state["momentum_buffer"] = b = momentum * kept(state, "momentum_buffer", g) + (1.0 - dampening) * g
        g = g + momentum * b if options.get("nesterov") else b
    return -float(options["lr"]) * g


def novograd(theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Options) -> torch.Tensor:
    """Return ``-lr * m``, ``m = b1 m + g / (sqrt(v) + eps) + weight_decay * theta``, v the average of ``|g|^2``.

    Both start from the first gradient's; ``grad_averaging`` takes ``1 - b1`` of what is added later.

    Reference: Ginsburg et al. 2019, Stochastic gradient methods with layer-wise adaptive moments, algorithm 1.
    """
    refuse(options, "amsgrad")
    b1, b2 = (float(beta) for beta in options["betas"])
    g = ascent(gradient, options)
    square, first = g.square().sum(), "moments" not in state
    state["grads_ema"] = v = square if first else b2 * state["grads_ema"] + (1.0 - b2) * square
    g, shrink = decayed(g / (v.sqrt() + float(options["eps"])), theta, options, decouple=False)
    if first:
        state["moments"] = g
    else:
        state["moments"] = b1 * state["moments"] + (1.0 - b1 if options.get("grad_averaging") else 1.0) * g
    update: torch.Tensor = shrink - float(options["lr"]) * state["moments"]
    return update


_NO_MEMORY = {"betas": (0.0, 0.0)}
LAMB = Rule("LAMB", lamb, _NO_MEMORY, elementwise=False)
LARS = Rule("LARS", lars, {"momentum": 0.0, "nesterov": False}, elementwise=False)
NOVOGRAD = Rule("NovoGrad", novograd, _NO_MEMORY, elementwise=False)
