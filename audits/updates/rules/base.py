"""What a reference rule is: one optimizer's update of one tensor, in float64, written from its published formula."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from audits.updates.rules.scalars import EXACT, Scalars

#: State of one tensor, under the names that torch.optim gives its state; tensors in float64, counters as floats.
State = dict[str, Any]
#: Options of the tensor's param group.
Options = Mapping[str, Any]

#: Option that tells a rule how an implementation works out its scalars; absent, as Python floats.
SCALARS = "audit.scalars"

#: ``update(theta, gradient, state, options) -> d``: the update ``theta' - theta``; advances ``state``.
Update = Callable[[torch.Tensor, torch.Tensor, State, Options], torch.Tensor]


@dataclass(frozen=True)
class Rule:
    """The reference rule of one optimizer class.

    Attributes:
        name: the class's name in `torch.optim`.
        update: the formula.
        momentum: options that switch the rule's memory of past gradients off; used to tell how large that term is.
        relative: relative error that replaces the eps measure, by dtype, for rules whose own arithmetic is coarser
            than the weights' dtype.
        cosine: least cosine between update and reference, where ``relative`` is coarse.
        noise: relative scatter that the rule's own coarse arithmetic makes on this very gradient.
        matrices: the rule takes only two-dimensional tensors.
        products: the rule multiplies matrices in the weights' own dtype, TF32 where torch's switches allow it.
        elementwise: each element's update depends on that element alone.
        sparse: the rule takes only sparse gradients.
    """

    name: str
    update: Update
    momentum: Options
    relative: Mapping[torch.dtype, float] | None = None
    cosine: float | None = None
    noise: Callable[[torch.Tensor, torch.Tensor, State, Options], float] | None = None
    matrices: bool = False
    products: bool = False
    elementwise: bool = True
    sparse: bool = False


def scalars_of(options: Options) -> Scalars:
    """Return how the judged implementation works out its scalars."""
    found = options.get(SCALARS, EXACT)
    assert isinstance(found, Scalars)
    return found


def advance(state: State) -> float:
    """Count the step and return its number, starting from 1."""
    state["step"] = float(state.get("step", 0.0)) + 1.0
    return float(state["step"])


def kept(state: State, name: str, like: torch.Tensor) -> torch.Tensor:
    """Return a state tensor, zeros when there is none yet."""
    value = state.get(name)
    return torch.zeros_like(like) if value is None else value


def ascent(gradient: torch.Tensor, options: Options) -> torch.Tensor:
    """Return the gradient to descend along: ``-g`` under ``maximize``."""
    return -gradient if options.get("maximize") else gradient


def coupled(gradient: torch.Tensor, theta: torch.Tensor, options: Options) -> torch.Tensor:
    """Return ``g + weight_decay * theta``: the decay of an L2 penalty."""
    decay = float(options.get("weight_decay") or 0.0)
    return gradient + decay * theta if decay else gradient


def decoupled(theta: torch.Tensor, options: Options) -> torch.Tensor | float:
    """Return ``-lr * weight_decay * theta``: decay apart from the gradient (Loshchilov & Hutter 2019)."""
    decay = float(options.get("weight_decay") or 0.0)
    return -float(options["lr"]) * decay * theta if decay else 0.0
