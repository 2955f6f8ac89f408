"""Which other rule would explain an update that its own rule does not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from audits.updates.compare import deviation, judge, rms
from audits.updates.judge.apply_rule import copy_state, reference_update
from audits.updates.rules import RULES, Rule, State

#: An update is a multiple of the rule's when the angle between them is below this (1 - cosine).
PARALLEL = 1e-4


def explain(
    rule: Rule, theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Mapping[str, Any],
    actual: torch.Tensor, dtype: torch.dtype,
) -> str:  # fmt: skip
    """Return the best alternative that explains ``actual``, as half a sentence; empty when none does.

    Args:
        rule: the rule that was declared.
        theta: weights before, float64.
        gradient: as received.
        state: the reference state before the step.
        options: the group's options.
        actual: the update that was made, float64.
        dtype: dtype of the weights.
    """
    if not rms(actual):
        return "there was no update at all"
    best: tuple[float, str] | None = None
    for text, other, other_options, other_state, other_gradient in _alternatives(rule, gradient, state, options):
        try:
            update = reference_update(other, theta, other_gradient, copy_state(other_state), other_options)
        except (KeyError, TypeError, ValueError, RuntimeError, ZeroDivisionError):
            continue
        found = judge(deviation(actual, update, theta, dtype), other, dtype, other_options)
        if found.met and (best is None or found.error < best[0]):
            best = (found.error, text)
    if best is not None:
        return f"it is explained by {best[1]}"
    return _multiple(rule, theta, gradient, state, options, actual)


def _alternatives(
    rule: Rule, gradient: torch.Tensor, state: State, options: Mapping[str, Any]
) -> Iterator[tuple[str, Rule, Mapping[str, Any], State, torch.Tensor]]:
    decay = options.get("weight_decay")
    if decay:
        yield "the rule without weight decay", rule, {**options, "weight_decay": 0.0}, state, gradient
        for factor in (2.0, 0.5):
            changed = {**options, "weight_decay": decay * factor}
            yield f"weight decay applied {factor:g} times", rule, changed, state, gradient
        for name in ("Adam", "AdamW"):
            if name != rule.name and rule.name in ("Adam", "AdamW"):
                kind = "decoupled" if name == "AdamW" else "coupled"
                changed = {**options, "decoupled_weight_decay": name == "AdamW"}
                yield f"{name}'s {kind} weight decay", RULES[name], changed, state, gradient
        lr = float(options.get("lr") or 0.0)
        if lr and not options.get("decoupled_weight_decay"):
            yield "weight decay not multiplied by lr", rule, {**options, "weight_decay": decay / lr}, state, gradient
    yield "the opposite sign (ascent for descent)", rule, options, state, -gradient
    if rule.momentum:
        yield "the rule without momentum", rule, {**options, **rule.momentum}, state, gradient
    if options.get("momentum"):
        yield "a fresh momentum buffer (state lost)", rule, options, {}, gradient
        if options.get("dampening"):
            yield "momentum without dampening", rule, {**options, "dampening": 0.0}, state, gradient
        flipped = not options.get("nesterov")
        text = "Nesterov momentum" if flipped else "plain momentum in place of Nesterov's"
        yield text, rule, {**options, "nesterov": flipped}, state, gradient
    elif state:
        yield "fresh optimizer state (state lost)", rule, options, {}, gradient
    if "step" in state or "betas" in options:
        late = {**state, "step": 1e9}
        yield "the rule without bias correction", rule, options, late, gradient
    if options.get("amsgrad"):
        yield "the rule without amsgrad", rule, {**options, "amsgrad": False}, state, gradient
    if len(options.get("betas") or ()) == 2:
        b1, b2 = options["betas"]
        yield "betas in the wrong order", rule, {**options, "betas": (b2, b1)}, state, gradient


def _multiple(
    rule: Rule, theta: torch.Tensor, gradient: torch.Tensor, state: State, options: Mapping[str, Any],
    actual: torch.Tensor,
) -> str:  # fmt: skip
    """Say by how much the update is a multiple of the rule's, or of the gradient's."""
    reference = reference_update(rule, theta, gradient, copy_state(state), options)
    plain = reference_update(RULES["SGD"], theta, gradient.to_dense(), {}, {"lr": options.get("lr") or 1.0})
    bare = reference_update(rule, theta, gradient, copy_state(state), {**options, "weight_decay": 0.0})
    for update, text in (
        (reference, "the rule's"),
        (bare, "the rule's without weight decay"),
        (plain, "-lr * gradient"),
    ):
        size = float((update * update).sum())
        if not size:
            continue
        factor = float((actual * update).sum()) / size
        rest = rms(actual - factor * update)
        if factor and rest <= PARALLEL * rms(actual):
            return f"it is {factor:.6g} times {text} (as with lr times {factor:.6g})"
    return ""
