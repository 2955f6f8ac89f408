"""Rules of whole matrices as others than torch publish them: fairseq's Adafactor, Muon of its author."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from audits.updates.rules.adam import adamw
from audits.updates.rules.base import (
    PACKAGE,
    Options,
    Rule,
    State,
    ascent,
    average,
    count,
    decayed,
    kept,
    refuse,
)

#: Coefficients and steps of the published Newton-Schulz iteration, and what is added to the norm before it.
COEFFICIENTS, NS_STEPS, NS_EPS = (3.4445, -4.7750, 2.0315), 5, 1e-7

#: A quarter of the relative scatter at least that bfloat16 iterations are allowed, as for torch's Muon.
SCATTER = 0.0125


def adafactor_fairseq(theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Options) -> torch.Tensor:
    """Return ``-alpha U / max(1, rms(U) / clip_threshold)``, averaged with ``beta1`` where that is given.

    ``alpha = rho`` or, with ``scale_parameter``, ``max(eps2, rms(theta)) rho``; rho is lr or, with ``relative_step``,
    ``min(0.01, 1 / sqrt(t))`` (``1e-6 t`` for 0.01 under ``warmup_init``). ``beta_t = 1 - t^decay_rate`` averages
    ``g^2 + eps1``, in rows and columns for matrices; ``U = g / sqrt(V)``. The decay is ``alpha weight_decay theta``.

    Reference: Shazeer & Stern 2018, Adafactor, algorithms 4 to 6, with the options that fairseq and transformers give.
    """
    refuse(options)
    t = count(state, options)
    alpha = _rate(theta, t, options, float(options["eps"][1]))
    rest = math.pow(t, float(options["decay_rate"]))
    u = alpha * _clipped(ascent(gradient, options), state, options, rest, float(options["eps"][0]))
    if options["beta1"] is not None:
        u = average(state, "exp_avg", float(options["beta1"]), u)
    return -u - alpha * float(options["weight_decay"]) * theta


def adafactor_capped(theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Options) -> torch.Tensor:
    """Return the same with ``beta_t = min(b2, 1 - t^decay_rate)`` and a momentum that is kept in ``momentum_dtype``.

    As `adafactor_fairseq` with the options that pytorch_optimizer gives: ``betas``, ``eps1``, ``eps2``, a decay that
    may be coupled. What enters the momentum and the momentum itself are rounded to its dtype.
    """
    refuse(options)
    t = count(state, options)
    alpha = _rate(theta, t, options, float(options["eps2"]))
    b1, b2 = options["betas"][0], float(options["betas"][1])
    g, shrink = decayed(ascent(gradient, options), theta, options, decouple=True, lr=alpha)
    rest = 1.0 - min(b2, 1.0 - math.pow(t, float(options["decay_rate"])))
    u = alpha * _clipped(g, state, options, rest, float(options["eps1"]))
    if b1 is not None:
        store = _finest(options["momentum_dtype"])
        before = kept(state, "exp_avg", u)
        state["exp_avg"] = u = (before + (1.0 - float(b1)) * (u.to(store).double() - before)).to(store).double()
    return shrink - u


def _finest(store: torch.dtype) -> torch.dtype:
    """The dtype that a rule rounds to: only what is coarser than any weights is told from float64."""
    return store if torch.finfo(store).eps > torch.finfo(torch.float32).eps else torch.float64


def _rate(theta: torch.Tensor, t: float, options: Options, least: float) -> float:
    rho = 0.0 if options["relative_step"] else float(options["lr"])
    if options["relative_step"]:
        rho = min(1e-6 * t if options["warmup_init"] else 1e-2, 1.0 / math.sqrt(t))
    return max(least, float(theta.square().mean().sqrt())) * rho if options["scale_parameter"] else rho


def _clipped(g: torch.Tensor, state: State, options: Options, rest: float, eps: float) -> torch.Tensor:
    """Return ``U / max(1, rms(U) / clip_threshold)`` and advance the second moment."""
    square = g * g + eps
    if g.dim() > 1:
        r = average(state, "exp_avg_sq_row", 1.0 - rest, square.mean(dim=-1))
        c = average(state, "exp_avg_sq_col", 1.0 - rest, square.mean(dim=-2))
        v = (r / r.mean(dim=-1, keepdim=True)).unsqueeze(-1) * c.unsqueeze(-2)
    else:
        v = average(state, "exp_avg_sq", 1.0 - rest, square)
    u = g / v.sqrt()
    return u / max(1.0, float(u.square().mean().sqrt()) / float(options["clip_threshold"]))


def muon_published(
    theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Options, store: torch.dtype = torch.float64
) -> torch.Tensor:  # fmt: skip
    """Return ``-lr * s * O - lr * weight_decay * theta``, O the Newton-Schulz orthogonalisation of the momentum.

    As torch's Muon (`rules.matrix`), on tensors flattened to a matrix; a group with ``use_muon=False`` takes AdamW's
    step. ``s = sqrt(max(1, rows / columns))``, where the author's code takes a kernel's last two sides for them and
    pytorch_optimizer the flattened ones.

    Args:
        theta: weights, float64.
        gradient: as received, float64.
        state: ``momentum_buffer``; ``exp_avg`` and ``exp_avg_sq`` of AdamW groups.
        options: the group's options.
        store: dtype that every product and sum is rounded to; the published code runs in bfloat16.

    Reference: Jordan et al. 2024, Muon, and its code.
    """
    refuse(options)
    if options.get("ns_method", "newton_schulz") != "newton_schulz":
        raise ValueError("the rule is written for the plain Newton-Schulz iteration")
    if not options.get("use_muon", True):
        t = count(state, options) - 1.0
        return adamw(theta, gradient, _counted(state, t), options)
    momentum, lr = float(options["momentum"]), float(options["lr"])
    g, shrink = decayed(ascent(gradient, options), theta, options, decouple=True)
    b = average(state, "momentum_buffer", momentum, g)
    step = (1.0 - momentum) * g + momentum * b if options.get("nesterov", True) else b
    matrix = step.reshape(step.shape[0], -1)
    rows, columns = matrix.shape
    x = matrix.T if rows > columns else matrix

    def stored(value: torch.Tensor) -> torch.Tensor:
        return value.to(store).double()

    x = stored(x)
    x = stored(x / (float(x.norm()) + NS_EPS))
    steps = int(options.get("ns_steps", NS_STEPS))
    for c1, c2, c3 in _coefficients(options.get("ns_coeffs", COEFFICIENTS), steps):
        a = stored(x @ x.T)
        b = stored(stored(c2 * a) + stored(c3 * stored(a @ a)))
        x = stored(stored(c1 * x) + stored(b @ x))
    x = (x.T if rows > columns else x).reshape(step.shape)
    return shrink - lr * _scale(step.shape, options) * x


def _counted(state: State, t: float) -> State:
    state["step"] = t
    return state


def _coefficients(given: Sequence[object], steps: int) -> list[tuple[float, float, float]]:
    """Return the three coefficients of every step: one triple for all, or one a step, the last repeated."""
    triples = [given] if isinstance(given[0], (int, float)) else list(given)
    return [tuple(map(float, triples[min(i, len(triples) - 1)])) for i in range(steps)]  # type: ignore[call-overload, misc]


def published_scatter(theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Options) -> float:
    """Return the relative scatter of bfloat16 iterations on this momentum; none where AdamW steps."""
    if not options.get("use_muon", True):
        return 0.0
    bare = {**options, "weight_decay": 0.0}
    exact = muon_published(theta, gradient, dict(state), bare)
    rounded = muon_published(theta, gradient, dict(state), bare, torch.bfloat16)
    size = float(torch.linalg.vector_norm(exact))
    return max(SCATTER, float(torch.linalg.vector_norm(rounded - exact)) / size) if size else 0.0


def published_rounded(theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Options) -> torch.Tensor:
    """Return `muon_published`'s update, with the roundings of the author's code: see `matrix.muon_rounded`."""
    step, scale, triples = _to_iterate(theta, gradient, state, options)
    rows, columns = step.shape
    x = step.bfloat16().T if rows > columns else step.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + NS_EPS)
    for c1, c2, c3 in triples:
        a = x @ x.T
        x = c1 * x + (c2 * a + c3 * a @ a) @ x
    x = (x.T if rows > columns else x) * scale
    return _iterated(theta, x, 1.0, options)


def published_fused(theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Options) -> torch.Tensor:
    """Return the same with the roundings of pytorch_optimizer's code: products and sums in one, the scale outside."""
    step, scale, triples = _to_iterate(theta, gradient, state, options)
    rows, columns = step.shape
    x = (step.T if rows > columns else step).to(torch.bfloat16, copy=True, memory_format=torch.contiguous_format)
    x = x / x.norm(2, dim=(-2, -1), keepdim=True).clamp_min(NS_EPS)
    for c1, c2, c3 in triples:
        a = x @ x.T
        x = torch.addmm(x, torch.addmm(a, a, a, beta=c2, alpha=c3), x, beta=c1)
    return _iterated(theta, x.T if rows > columns else x, scale, options)


def _to_iterate(
    theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Options
) -> tuple[torch.Tensor, float, list[tuple[float, float, float]]]:
    """Return the matrix that is orthogonalised, in the gradient's dtype, the step's scale, and the coefficients."""
    momentum = float(options["momentum"])
    g = ascent(gradient, options)
    b = kept(state, "momentum_buffer", g).lerp(g, 1.0 - momentum)
    step = g.lerp(b, momentum) if options.get("nesterov", True) else b
    matrix = step.reshape(step.shape[0], -1)
    steps = int(options.get("ns_steps", NS_STEPS))
    return matrix, _scale(step.shape, options), _coefficients(options.get("ns_coeffs", COEFFICIENTS), steps)


def _iterated(theta: torch.Tensor, x: torch.Tensor, scale: float, options: Options) -> torch.Tensor:
    lr = float(options["lr"])
    _, shrink = decayed(theta, theta, options, decouple=True)
    return shrink - lr * scale * x.double().reshape(theta.shape)


def _scale(shape: torch.Size, options: Options) -> float:
    """Return ``s`` of `muon_published`."""
    rows, columns = shape[0], math.prod(shape[1:])
    if options.get("use_adjusted_lr"):
        return 0.2 * math.sqrt(max(rows, columns))
    sides = (rows, columns) if options.get(PACKAGE) == "pytorch_optimizer" else tuple(shape[-2:])
    return math.sqrt(max(1.0, sides[0] / sides[1]))


def rmsprop_tensorflow(theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Options) -> torch.Tensor:
    """Return RMSprop's step with eps under the root, the mean square starting at 1, and lr inside the momentum.

    ``v = alpha v + (1 - alpha) g^2``; ``b = momentum b + lr g / sqrt(v - mean^2 + eps)``; ``d = -b``.

    Reference: the documentation of TensorFlow 1's RMSPropOptimizer; options as timm names them.
    """
    refuse(options)
    alpha, lr, momentum = float(options["alpha"]), float(options["lr"]), float(options.get("momentum") or 0.0)
    changed = {**options, "weight_decouple": bool(options.get("decoupled_decay"))}
    g, shrink = decayed(ascent(gradient, options), theta, changed, decouple=False)
    state["square_avg"] = v = alpha * state.get("square_avg", torch.ones_like(g)) + (1.0 - alpha) * g * g
    if options.get("centered"):
        v = v - average(state, "grad_avg", alpha, g).square()
    step = g / (v + float(options["eps"])).sqrt()
    if not momentum:
        b = lr * step
    elif options.get("lr_in_momentum", True):
        state["momentum_buffer"] = b = momentum * kept(state, "momentum_buffer", g) + lr * step
    else:
        state["momentum_buffer"] = b = momentum * kept(state, "momentum_buffer", g) + step
        b = lr * b
    moved: torch.Tensor = shrink - b
    return moved


ADAFACTOR_FAIRSEQ = Rule("Adafactor", adafactor_fairseq, {}, elementwise=False)
ADAFACTOR_CAPPED = Rule("Adafactor", adafactor_capped, {}, elementwise=False, rounds=True)
MUON_PUBLISHED = Rule(
    "Muon",
    muon_published,
    {"momentum": 0.0},
    relative=dict.fromkeys((torch.float64, torch.float32, torch.bfloat16, torch.float16), 1e-6),
    cosine=0.995,
    noise=published_scatter,
    rounded=(published_rounded, published_fused),
    matrices=True,
    elementwise=False,
)
RMSPROP_TENSORFLOW = Rule("RMSpropTF", rmsprop_tensorflow, {"momentum": 0.0})
