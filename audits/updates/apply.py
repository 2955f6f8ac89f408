"""A reference rule applied to the tensors of a phase: which rule, which options, which state to start from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from audits.lanes import precision
from audits.lanes.precision import INSIDE_EPS, Product
from audits.optimizers import optimizer_class
from audits.subject import LivePhase, Subject
from audits.updates.compare import PRODUCT_EPS, to_double
from audits.updates.hyperparameters import expected_class_name
from audits.updates.rules import RULES, Rule, State

#: State that is one number per parameter; everything else has the shape of (part of) the weights.
COUNTERS = ("step", "eta", "mu", "mu_product")

#: Code that is not torch's may well compute in float32 whatever the weights are: as NAdam's float32 scalars.
FOREIGN_TOLERANCE = 1e-6


def rule_for(subject: Subject, phase: LivePhase) -> Rule | None:
    """Return the rule by which a phase's optimizer is judged, or None.

    A class of torch.optim has its own rule, and so has a subclass that does not override ``step``. Any other class is
    judged by the rule that ``expect["optimizer"]`` declares, or by that of the torch class whose name it bears.
    """
    cls = optimizer_class(phase.recipe.optimizer)
    for ancestor in cls.__mro__:
        if "step" in vars(ancestor):
            if getattr(torch.optim, ancestor.__name__, None) is ancestor:
                # AdamW inherits Adam's step: the first class of torch's own names the rule.
                exported = next(c for c in cls.__mro__ if getattr(torch.optim, c.__name__, None) is c)
                return RULES.get(exported.__name__)
            break
    declared = expected_class_name(subject.recipe.expect.get("optimizer"), phase.name)
    rule = RULES.get(declared or "") or RULES.get(cls.__name__)
    if rule is None or not _has_options(rule, phase):
        return None
    return dataclasses.replace(rule, relative={torch.float64: FOREIGN_TOLERANCE, **(rule.relative or {})})


def _has_options(rule: Rule, phase: LivePhase) -> bool:
    """Whether a class of somebody's own has the options, under torch's names, that the rule is written in."""
    theta = torch.ones(2, 2, dtype=torch.float64)
    gradient = theta.to_sparse() if rule.sparse else theta
    try:
        for group in phase.recipe.optimizer.groups:
            reference_update(rule, theta, gradient, {}, rule_options(phase, group.options, torch.float32))
    except (KeyError, TypeError, ValueError):
        return False
    return True


def is_lbfgs(phase: LivePhase) -> bool:
    """Whether the phase's optimizer is torch's LBFGS, which has a rule of its own kind."""
    return issubclass(optimizer_class(phase.recipe.optimizer), torch.optim.LBFGS)


def rule_options(phase: LivePhase, options: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return a group's options as the rule takes them; ``dtype`` is that of the native weights.

    With them goes the eps of float32 matrix products where they may run in TF32.

    torch's Adagrad reads ``initial_accumulator_value`` from the constructor and ignores a group's own.
    """
    chosen = {**phase.recipe.optimizer.defaults, **options, "dtype": dtype}
    if (parameter := next(iter(phase.parameters.values()), None)) is not None:
        inside = precision.float32_precision(parameter.device, Product.MATMUL)
        chosen[PRODUCT_EPS] = INSIDE_EPS.get(inside, 0.0)
    if "initial_accumulator_value" in phase.recipe.optimizer.defaults:
        chosen["initial_accumulator_value"] = phase.recipe.optimizer.defaults["initial_accumulator_value"]
    return chosen


def reference_state(state: Mapping[str, Any] | None, device: torch.device) -> State:
    """Return a captured torch state as a rule's state: tensors in float64 on the device, counters as numbers."""
    return {name: _reference_value(name, value, device) for name, value in (state or {}).items() if value is not None}


def _reference_value(name: str, value: Any, device: torch.device) -> Any:
    if name in COUNTERS:
        return float(value)
    return to_double(value.to(device)) if isinstance(value, torch.Tensor) else value


def reference_update(
    rule: Rule, theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Mapping[str, Any]
) -> torch.Tensor:
    """Return the rule's update in float64 and advance ``state``.

    Args:
        rule: the rule.
        theta: weights in float64 (complex ones as pairs of reals).
        gradient: as received: any dtype, dense or sparse.
        state: the rule's state; changed.
        options: the group's options.
    """
    if rule.sparse:
        gradient = gradient.detach().to(torch.float64)
        return rule.update(theta, gradient if gradient.is_sparse else gradient.to_sparse(), state, options)
    return rule.update(theta, to_double(gradient.to_dense()), state, options)


def copy_state(state: State) -> State:
    """Return a copy that a trial of another rule may advance; rules never change tensors in place."""
    return dict(state)
