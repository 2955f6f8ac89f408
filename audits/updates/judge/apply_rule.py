"""A reference rule applied to the tensors of a phase: which rule, which options, which state to start from."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from audits.errors import RecipeError, suggest
from audits.lanes import precision
from audits.lanes.precision import INSIDE_EPS, Product
from audits.live.subject import LivePhase, Subject
from audits.recipe.callables import CallableReference
from audits.recipe.constructing import optimizer_class
from audits.recipe.optimizers import RUNNING
from audits.updates.compare import FOREIGN_TOLERANCE, PRODUCT_EPS, to_double
from audits.updates.judge.own_attributes import attributes_of
from audits.updates.rules import PUBLISHED, RULES, Options, Rule, State, plain_name
from audits.updates.rules.base import PACKAGE
from audits.updates.rules.coarse_names import bare_name, declares

#: State that is one number per parameter; everything else has the shape of (part of) the weights.
COUNTERS = ("step", "eta", "mu", "mu_product")


#: How messages name the user's own reference.
OPTIMIZER_RULE = "expect['optimizer_rule']"


def rule_for(subject: Subject, phase: LivePhase) -> Rule | None:
    """Return the rule by which a phase's optimizer is judged, with how it was found (`Rule.found`), or None.

    In this order: the reference of one's own that ``expect["optimizer_rule"]`` names; torch's own class, also under a
    subclass that inherits its ``step``; the class that ``expect["optimizer"]`` names; for a subclass of a torch class
    that overrides ``step``, its nearest torch ancestor; a published rule for a class of that name and options.
    """
    cls = optimizer_class(phase.recipe.optimizer)
    if (own := declared_rule(subject, phase)) is not None:
        return dataclasses.replace(own, relative={torch.float64: FOREIGN_TOLERANCE})
    torchs = [c for c in cls.__mro__ if c is not torch.optim.Optimizer and _is_torchs(c)]
    if inherits_torchs_step(cls):
        # AdamW inherits Adam's step: the first class of torch's own names the rule.
        inherited = "" if torchs[0] is cls else f"whose step {cls.__name__} inherits"
        return _found(RULES.get(torchs[0].__name__), inherited)
    declared = expected_class_name(subject.recipe.expect.get("optimizer"), phase.name)
    candidates: list[Rule] = []
    if declared is not None:
        candidates += _named(declared, f"as expect['optimizer'] declares of {cls.__name__}", guessed=False)
    if declared is None or declared in {
        c.__name__ for c in cls.__mro__
    }:  # else something is meant that it is not called
        if torchs:
            candidates += _named(torchs[0].__name__, f"the nearest torch ancestor of {cls.__name__}")
        candidates += _named(cls.__name__, f"found by the name {cls.__name__}")
        if not candidates and declares(phase.recipe.optimizer):
            name = bare_name(cls.__name__)
            torchs_name = next((known for known in RULES if known.lower() == name), name)
            candidates += _named(torchs_name, f"found by the name {cls.__name__}, with a coarser state")
    known = {**attributes_of(phase), **phase.recipe.optimizer.defaults}
    candidates.sort(key=lambda r: not any(mark in known for mark in r.marks))  # stable: the order stays within each
    rule = next((r for r in candidates if _has_options(r, phase)), None)
    return None if rule is None else dataclasses.replace(
        rule, relative={torch.float64: FOREIGN_TOLERANCE, **(rule.relative or {})}
    )  # fmt: skip


def inherits_torchs_step(cls: type[torch.optim.Optimizer]) -> bool:
    """Whether a class's ``step`` is that of its nearest ancestor in torch.optim, or its own as such.

    torch wraps the step of every class that is made into an object, and sets it on that very class: what it wrapped is
    compared.
    """
    nearest = next((c for c in cls.__mro__ if c is not torch.optim.Optimizer and _is_torchs(c)), None)
    return nearest is not None and _bare_step(cls) is _bare_step(nearest)


def _bare_step(cls: type[torch.optim.Optimizer]) -> Any:
    step: Any = cls.step
    while getattr(step, "hooked", False) and hasattr(step, "__wrapped__"):
        step = step.__wrapped__
    return step


def _is_torchs(cls: type) -> bool:
    return getattr(torch.optim, cls.__name__, None) is cls


def _found(rule: Rule | None, how: str) -> Rule | None:
    return None if rule is None else dataclasses.replace(rule, found=how)


def _named(name: str, how: str, *, guessed: bool = True) -> list[Rule]:
    """Return the rules of that name, torch's own first."""
    rules = [RULES[name]] if name in RULES else []
    return [
        dataclasses.replace(rule, found=how, guessed=guessed) for rule in (*rules, *PUBLISHED.get(plain_name(name), ()))
    ]


def declared_rule(subject: Subject, phase: LivePhase) -> Rule | None:
    """Return the reference of the user's own that ``expect["optimizer_rule"]`` names for a phase, or None.

    Raises:
        RecipeError: it cannot be imported, or does not return an update for a matrix.
    """
    meant = subject.recipe.expect.get("optimizer_rule")
    if isinstance(meant, Mapping):
        phases = [p.name for p in subject.phases]
        for name in meant:
            if name not in phases:
                raise RecipeError(f"{OPTIMIZER_RULE} names an unknown phase {name!r}{suggest(str(name), phases)}")
        meant = meant.get(phase.name)
    if meant is None:
        return None
    reference = CallableReference.of(meant, role=OPTIMIZER_RULE)
    rule = own_rule(reference.describe(), reference.resolve(role=OPTIMIZER_RULE))
    group = next(iter(phase.recipe.optimizer.groups))
    options = rule_options(phase, group.options, torch.float64)
    matrix = torch.ones(2, 2, dtype=torch.float64)
    try:
        reference_update(rule, matrix, matrix, {}, options)
    except Exception as error:  # the user's code: whatever it raises is its answer
        raise RecipeError(
            f"{OPTIMIZER_RULE} {rule.name!r} gives no update for a matrix ({type(error).__name__}: {error}): it is "
            "called as update(theta, gradient, state, options), and returns the float64 tensor d that is added to theta"
        ) from error
    return rule


def own_rule(name: str, update: Callable[[torch.Tensor, torch.Tensor, State, Options], torch.Tensor]) -> Rule:
    """Return a user's own reference as a rule: it may write into its arguments, which are copies."""

    def apart(theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Options) -> torch.Tensor:
        own = {k: v.clone() if isinstance(v, torch.Tensor) else copy.deepcopy(v) for k, v in state.items()}
        plain = {key: value for key, value in options.items() if not key.startswith("audit.")}
        found = update(theta.clone(), gradient.clone(), own, plain)
        if found.shape != theta.shape:
            raise ValueError(f"the update's shape is {tuple(found.shape)}, the weights' {tuple(theta.shape)}")
        kept_as_it_was = {k: v for k, v in state.items() if k in own and _equal(v, own[k])}
        state.clear()
        state.update({**own, **kept_as_it_was})
        return found.detach().to(torch.float64)

    return Rule(name, apart, {}, elementwise=False, found=OPTIMIZER_RULE)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and torch.equal(one, other)
    return bool(one == other)


def _has_options(rule: Rule, phase: LivePhase) -> bool:
    """Whether a class of somebody's own has the options, under the names that the rule is written in."""
    return _refusal(rule, phase) is None


def _refusal(rule: Rule, phase: LivePhase) -> Exception | None:
    """Return what a rule raises on the options of a phase's groups, None where it takes them."""
    theta = torch.ones(2, 2, dtype=torch.float64)
    gradient = theta.to_sparse() if rule.sparse else theta
    try:
        for group in phase.recipe.optimizer.groups:
            reference_update(rule, theta, gradient, {}, rule_options(phase, group.options, torch.float32))
    except (KeyError, TypeError, ValueError) as error:
        return error
    return None


def why_not_held_to(subject: Subject, phase: LivePhase, name: str) -> str:
    """Return why a phase's optimizer is not judged by the rule that ``expect["optimizer"]`` names; "" where it is."""
    if rule_for(subject, phase) is not None:
        return ""
    rules = _named(name, "")
    if not rules:
        return "no rule of that name is known; give your own by expect['optimizer_rule']"
    refusal = _refusal(rules[0], phase)
    if isinstance(refusal, KeyError):
        return f"its options lack {refusal}, which the rule reads; put that in the optimizer's defaults"
    return f"its options do not fit the rule ({refusal})"


def is_lbfgs(phase: LivePhase) -> bool:
    """Whether the phase's optimizer is torch's LBFGS, which has a rule of its own kind."""
    return issubclass(optimizer_class(phase.recipe.optimizer), torch.optim.LBFGS)


def rule_options(phase: LivePhase, options: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return a group's options as the rule takes them; ``dtype`` is that of the native weights.

    With them goes the eps of float32 matrix products where they may run in TF32, and what a class that is not torch's
    keeps as attributes (``self.maximize``).

    torch's Adagrad reads ``initial_accumulator_value`` from the constructor and ignores a group's own.
    """
    defaults = {k: v for k, v in phase.recipe.optimizer.defaults.items() if k not in RUNNING}
    chosen = {**attributes_of(phase), **defaults, **options, "dtype": dtype}
    chosen[PACKAGE] = phase.recipe.optimizer.class_path.partition(".")[0]
    if (parameter := next(iter(phase.parameters.values()), None)) is not None:
        inside = precision.float32_precision(parameter.device, Product.MATMUL)
        chosen[PRODUCT_EPS] = INSIDE_EPS.get(inside, 0.0)
    if "initial_accumulator_value" in phase.recipe.optimizer.defaults:
        chosen["initial_accumulator_value"] = phase.recipe.optimizer.defaults["initial_accumulator_value"]
    return chosen


def reference_state(
    state: Mapping[str, Any] | None, device: torch.device, names: Mapping[str, str | None] | None = None
) -> State:
    """Return a captured state as a rule's state: tensors in float64 on the device, counters as numbers.

    Args:
        state: an optimizer's state of one parameter.
        device: where the parameter is.
        names: for each of the rule's names the optimizer's, where they differ.
    """
    state = dict(state or {})
    for key, name in (names or {}).items():
        if name is not None and name != key and name in state:
            state[key] = state.pop(name)
    return {name: _reference_value(name, value, device) for name, value in state.items() if value is not None}


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


def expected_class_name(expected: Any, phase: str) -> str | None:
    """Return the class name that ``expect["optimizer"]`` declares for a phase: a name, or a dict phase -> name."""
    if isinstance(expected, Mapping):
        expected = expected.get(phase)
    if isinstance(expected, type):
        expected = expected.__name__
    return None if expected is None else str(expected).replace(":", ".").rpartition(".")[2]
