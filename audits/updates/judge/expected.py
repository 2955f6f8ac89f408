"""What a rule expects of one parameter in one call: the update, and how large each term of it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from audits.live.subject import LivePhase
from audits.updates.compare import IMMATERIAL, THRESHOLDS, real_dtype, rms
from audits.updates.compare import to_double as double
from audits.updates.judge.apply_rule import COUNTERS, copy_state, reference_update, rule_options
from audits.updates.judge.kernels import with_scalar_options
from audits.updates.record.calls import Call
from audits.updates.rules import Rule, State

#: Elements from which the sizes of a rule's terms are taken: their rms is then known to about 1%.
SAMPLE = 8192

#: Relative error of counters and products that torch keeps in float32.
SCALAR_TOLERANCE = 1e-6

#: Dtypes that need a wider lane to resolve a rule.
LOW_PRECISION = (torch.bfloat16, torch.float16)


@dataclass
class Expected:
    """The reference update of one parameter in one call, with the rms of each term in it, of weights and update.

    ``elements`` is the parameter's size where the vectors are a sample of it, else 0.
    """

    theta: torch.Tensor
    update: torch.Tensor
    terms: dict[str, float]
    before: State
    options: Mapping[str, Any]
    gradient: torch.Tensor
    noise: float = 0.0
    size: float = 0.0
    length: float = 0.0
    elements: int = 0


def expect(
    rule: Rule,
    phase: LivePhase,
    call: Call,
    name: str,
    state: State,
    theta: torch.Tensor | None = None,
    lane: torch.dtype | None = None,
) -> Expected | None:
    """Return what the rule makes of the gradient that a parameter received; None where it received none.

    Args:
        rule: the rule.
        phase: the phase.
        call: the recorded call.
        name: the parameter.
        state: the rule's state before; advanced.
        theta: weights to start from in place of the recorded ones, float64.
        lane: dtype of the weights that the update is made in, where it is not their own.
    """
    gradient = call.gradients.get(name)
    if gradient is None:
        return None
    theta = double(call.before[name]) if theta is None else theta
    native = real_dtype(call.before[name].dtype)
    options = with_scalar_options(phase, rule, rule_options(phase, call.options[name], native), state, lane or native)
    before = copy_state(state)
    update = reference_update(rule, theta, gradient, state, options)
    terms = _terms(rule, *_sample(rule, theta, gradient, before, update), options)
    noise = rule.noise(theta, double(gradient), before, options) if rule.noise else 0.0
    return Expected(theta, update, terms, before, options, gradient, noise, rms(theta), rms(update))


def _sample(
    rule: Rule, theta: torch.Tensor, gradient: torch.Tensor, state: State, update: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, State, torch.Tensor]:
    """Return every k-th element of a large tensor: a term's size is an average that some tell well enough."""
    every = theta.numel() // SAMPLE
    if every < 2 or not rule.elementwise:
        return theta, gradient, state, update

    def thin(value: Any) -> Any:
        whole = isinstance(value, torch.Tensor) and value.numel() == theta.numel()
        return value.reshape(-1)[::every] if whole else value

    dense = double(gradient.to_dense()) if gradient.is_complex() else gradient.to_dense()
    return thin(theta), thin(dense), {k: thin(v) for k, v in state.items()}, thin(update)


def _terms(
    rule: Rule,
    theta: torch.Tensor,
    gradient: torch.Tensor,
    state: State,
    update: torch.Tensor,
    options: Mapping[str, Any],
) -> dict[str, float]:
    """Return the rms of what each term adds to the update: what changes when the term is taken out."""
    terms = {"gradient": rms(update)}
    if options.get("weight_decay"):
        bare = reference_update(rule, theta, gradient, copy_state(state), {**options, "weight_decay": 0.0})
        terms["decay"] = rms(update - bare)
        terms["gradient"] = rms(bare)
    if state.get("step", state.get("momentum_buffer")) is not None and _remembers(options, rule):
        bare = reference_update(rule, theta, gradient, copy_state(state), {**options, **rule.momentum})
        terms["momentum"] = rms(update - bare)
    return {term: size for term, size in terms.items() if size > IMMATERIAL * rms(update)}


def _remembers(options: Mapping[str, Any], rule: Rule) -> bool:
    return bool(rule.momentum) and any(options.get(key) not in (None, value) for key, value in rule.momentum.items())


def state_error(rule: Rule, key: str, actual: Any, wanted: Any, before: Any, dtype: torch.dtype) -> tuple[float, float]:
    """Return (error, threshold) of one entry of an optimizer's state, in eps of the dtype it is kept in.

    Args:
        rule: the rule.
        key: the entry's name in torch.optim.
        actual: the optimizer's value, as it keeps it.
        wanted: the rule's value after the step.
        before: the rule's value before it.
        dtype: dtype of the weights.
    """
    if key in COUNTERS:
        # torch keeps its scalars in float32.
        close = abs(float(actual) - float(wanted)) <= SCALAR_TOLERANCE * abs(float(wanted))
        return (0.0 if close else float("inf"), 1.0)
    if not isinstance(wanted, torch.Tensor) or not isinstance(actual, torch.Tensor):
        return (0.0 if actual == wanted else float("inf"), 1.0)
    kept_in = real_dtype(actual.dtype)
    actual = torch.view_as_real(actual) if actual.is_complex() else actual
    if actual.shape != wanted.shape or not kept_in.is_floating_point:
        return float("inf"), 1.0
    scale = rms(wanted) + (rms(before) if isinstance(before, torch.Tensor) else 0.0)
    return state_distance(rule, rms(wanted - actual), scale, kept_in, dtype)


def state_distance(
    rule: Rule, off: float, scale: float, kept_in: torch.dtype, dtype: torch.dtype
) -> tuple[float, float]:  # fmt: skip
    """Return (error, threshold) of a tensor of an optimizer's state.

    Args:
        rule: the rule.
        off: rms of how far it is from the rule's.
        scale: rms of the rule's after the step, plus that before it.
        kept_in: real dtype that the optimizer keeps it in.
        dtype: dtype of the weights.
    """
    eps = max(torch.finfo(kept_in).eps, torch.finfo(dtype).eps)
    limit = THRESHOLDS[kept_in][0]
    tolerance = (rule.relative or {}).get(dtype)
    if tolerance is not None and scale and off <= tolerance * scale:
        return 0.0, limit
    return (off / (eps * scale) if scale else (float("inf") if off else 0.0)), limit
