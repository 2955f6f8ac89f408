"""Rules that look at a matrix as a whole: Adafactor's factored second moment, Muon's orthogonal step."""

from __future__ import annotations

import math

import torch

from audits.updates.rules.base import Options, Rule, State, advance, ascent, decoupled, kept


def adafactor(theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Options) -> torch.Tensor:
    """Return ``-alpha * U / max(1, rms(U) / d)`` with a second moment kept as row and column means.

    ``beta_t = 1 - t^beta2_decay``, ``alpha = max(eps2, rms(theta)) * min(lr, 1 / sqrt(t))``; for matrices
    ``R = beta R + (1 - beta) mean_columns(g^2)``, C likewise, ``V = R C / max(mean(R), eps1)``; for vectors V is the
    moment itself; ``U = g / max(sqrt(V), eps1)``. ``eps1`` None is the eps of the weights' dtype.

    Reference: Shazeer & Stern 2018, Adafactor, algorithms 4 and 5; decoupled decay as torch documents it.
    """
    lr, eps1, eps2 = float(options["lr"]), options["eps"][0], float(options["eps"][1])
    if eps1 is None:
        eps1 = torch.finfo(options["dtype"]).eps
    t = advance(state)
    rest = math.pow(t, float(options["beta2_decay"]))
    alpha = max(eps2, float(theta.square().mean().sqrt())) * min(lr, math.pow(t, -0.5))
    g = ascent(gradient, options)
    if g.dim() > 1:
        shape = list(g.shape)
        row, column = [*shape[:-1], 1], [*shape[:-2], 1, shape[-1]]
        r: torch.Tensor = state.get("row_var", g.new_zeros(row))
        c: torch.Tensor = state.get("col_var", g.new_zeros(column))
        state["row_var"] = r = (1.0 - rest) * r + rest * g.square().mean(dim=-1, keepdim=True)
        state["col_var"] = c = (1.0 - rest) * c + rest * g.square().mean(dim=-2, keepdim=True)
        v = r * c / r.mean(dim=-2, keepdim=True).clamp(min=eps1)
    else:
        state["variance"] = v = (1.0 - rest) * kept(state, "variance", g) + rest * g.square()
    u = g / v.sqrt().clamp(min=eps1)
    return -alpha * u / max(1.0, float(u.square().mean().sqrt()) / float(options["d"])) + decoupled(theta, options)


def muon(
    theta: torch.Tensor,
    gradient: torch.Tensor,
    state: State,
    options: Options,
    store: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Return ``-lr * s * O``, O the Newton-Schulz orthogonalisation of the momentum.

    ``b = momentum * b + (1 - momentum) * g`` (torch's code keeps a mean where its documentation prints a sum);
    Nesterov takes ``(1 - momentum) g + momentum b``. ``X = B / max(|B|, eps)``, then ns_steps of
    ``A = X X^T, X = a X + (b A + c A^2) X``. ``s = sqrt(max(1, rows / columns))``, or
    ``0.2 sqrt(max(rows, columns))`` for "match_rms_adamw".

    Args:
        theta: weights, float64.
        gradient: as received, float64.
        state: ``momentum_buffer``.
        options: the group's options.
        store: dtype that X is rounded to after every iteration; the published code runs in bfloat16.

    Reference: Jordan et al. 2024, Muon; Liu et al. 2025, Muon is scalable for LLM training.
    """
    momentum = float(options["momentum"])
    g = gradient
    state["momentum_buffer"] = b = momentum * kept(state, "momentum_buffer", g) + (1.0 - momentum) * g
    step = (1.0 - momentum) * g + momentum * b if options["nesterov"] else b
    rows, columns = theta.shape
    x = step.T if rows > columns else step
    x = (x / max(float(torch.linalg.vector_norm(x)), float(options["eps"]))).to(store).double()
    c1, c2, c3 = (float(c) for c in options["ns_coefficients"])
    for _ in range(int(options["ns_steps"])):
        a = x @ x.T
        x = (c1 * x + (c2 * a + c3 * a @ a) @ x).to(store).double()
    return _stepped(theta, x.T if rows > columns else x, options)


def muon_rounded(theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Options) -> torch.Tensor:
    """Return Muon's update with every sum and product rounded to bfloat16 where torch's code rounds it.

    On a gradient of low rank the iterations lift rounding as large as the update: only code that rounds at the same
    places, on the same device, comes out alike, and then to the weights' own rounding.

    Args:
        theta: weights, float64, on the device on which the update was made.
        gradient: as received, in the dtype of the weights that moved.
        state: ``momentum_buffer``, likewise; it is left as it is.
        options: the group's options.
    """
    momentum = float(options["momentum"])
    b = kept(state, "momentum_buffer", gradient).lerp(gradient, 1.0 - momentum)
    step = (gradient.lerp(b, momentum) if options["nesterov"] else b).bfloat16()
    rows, columns = theta.shape
    x = step.T if rows > columns else step
    x = x / x.norm().clamp(min=float(options["eps"]))
    c1, c2, c3 = (float(c) for c in options["ns_coefficients"])
    for _ in range(int(options["ns_steps"])):
        a = x @ x.T
        x = torch.addmm(x, torch.addmm(a, a, a, beta=c2, alpha=c3), x, beta=c1)
    return _stepped(theta, (x.T if rows > columns else x).double(), options)


def _stepped(theta: torch.Tensor, x: torch.Tensor, options: Options) -> torch.Tensor:
    """Return ``-lr * s * x`` and the decay."""
    rows, columns = theta.shape
    if options.get("adjust_lr_fn") == "match_rms_adamw":
        scale = 0.2 * math.sqrt(max(rows, columns))
    else:
        scale = math.sqrt(max(1.0, rows / columns))
    return -float(options["lr"]) * scale * x + decoupled(theta, options)


def muon_noise(theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Options) -> float:
    """Return the relative scatter of bfloat16 iterations on this momentum.

    Newton-Schulz lifts small singular values by up to ``c1^ns_steps`` (485), and their rounding with them: a gradient
    of low rank scatters far more than a random one.
    """
    bare = {**options, "weight_decay": 0.0}
    exact = muon(theta, gradient, dict(state), bare)
    rounded = muon(theta, gradient, dict(state), bare, torch.bfloat16)
    size = float(torch.linalg.vector_norm(exact))
    return float(torch.linalg.vector_norm(rounded - exact)) / size if size else 0.0


ADAFACTOR = Rule("Adafactor", adafactor, {}, products=True, elementwise=False)
#: torch runs Newton-Schulz in bfloat16: the healthy worst is 1.6e-2 relative and a cosine of 0.9999.
MUON = Rule(
    "Muon",
    muon,
    {"momentum": 0.0},
    relative=dict.fromkeys((torch.float64, torch.float32, torch.bfloat16, torch.float16), 0.05),
    cosine=0.995,
    noise=muon_noise,
    rounded=(muon_rounded,),
    matrices=True,
    elementwise=False,
)
