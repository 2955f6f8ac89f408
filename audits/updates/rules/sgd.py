"""SGD with momentum, and averaged SGD."""

from __future__ import annotations

import torch

from audits.updates.rules.base import Options, Rule, State, advance, ascent, coupled, kept


def sgd(theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Options) -> torch.Tensor:
    """Return ``-lr * step`` with momentum.

    ``g = grad + weight_decay * theta``; ``b = momentum * b + (1 - dampening) * g``, the first ``b`` being ``g``
    itself, undamped; ``step = g + momentum * b`` (nesterov) or ``b``.

    Reference: Sutskever et al. 2013, On the importance of initialization and momentum in deep learning, in the form
    that the documentation of torch.optim.SGD gives.
    """
    step = coupled(ascent(gradient, options), theta, options)
    momentum = float(options.get("momentum") or 0.0)
    if momentum:
        buffer = state.get("momentum_buffer")
        dampening = float(options.get("dampening") or 0.0)
        buffer = step.clone() if buffer is None else momentum * buffer + (1.0 - dampening) * step
        state["momentum_buffer"] = buffer
        step = step + momentum * buffer if options.get("nesterov") else buffer
    return -float(options["lr"]) * step


def asgd(theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Options) -> torch.Tensor:
    """Return ``-lambd * eta * theta - eta * g`` and keep the average.

    ``eta`` for the next step is ``lr / (1 + lambd * lr * t) ** alpha``: a changed lr acts one step late. The average
    is ``ax += mu * (theta' - ax)``, ``mu = 1 / max(1, t - t0)`` likewise from the step before.

    Reference: Polyak & Juditsky 1992; Bottou 2010.
    """
    lr, lambd, alpha, t0 = (float(options[key]) for key in ("lr", "lambd", "alpha", "t0"))
    eta, mu = float(state.get("eta", lr)), float(state.get("mu", 1.0))
    t = advance(state)
    g = coupled(ascent(gradient, options), theta, options)
    update = -lambd * eta * theta - eta * g
    average = kept(state, "ax", theta)
    state["ax"] = average + mu * (theta + update - average)
    state["eta"] = lr / (1.0 + lambd * lr * t) ** alpha
    state["mu"] = 1.0 / max(1.0, t - t0)
    return update


SGD = Rule("SGD", sgd, {"momentum": 0.0, "nesterov": False})
#: torch keeps ``eta`` and ``mu`` as float32 scalars: in float64 weights the healthy worst is 1.1e-7 relative.
ASGD = Rule("ASGD", asgd, {}, relative={torch.float64: 1e-6})
