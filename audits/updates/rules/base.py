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

#: Option that tells a rule which package the class is of: the same option may stand for two arithmetics.
PACKAGE = "audit.package"

#: What a failing row says where nobody declared the rule.
DECLARE = (
    ". If another rule is meant, declare it: expect={'optimizer': NAME} for a known one, "
    "expect={'optimizer_rule': 'package.module:update'} for your own"
)

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
        rounded: the rule with the roundings of its own coarse arithmetic, where known code has them, the one or the
            other.
        matrices: the rule takes only two-dimensional tensors.
        products: the rule multiplies matrices in the weights' own dtype, TF32 where torch's switches allow it.
        elementwise: each element's update depends on that element alone.
        sparse: the rule takes only sparse gradients.
        signs: the update's elements jump (a sign): where rounding decides which way, it may do so.
        found: how a rule for a class that is not torch's own was found, as half a sentence.
        guessed: nobody declared the rule: it was found by what the class inherits or is called.
        inside: rms of what the update is a small difference of, where that is larger than weights and update: its
            rounding is theirs.
        rounds: the rule keeps its state in the dtype that an option names.
        marks: options that tell this variant from others of the same name: a class that has one of them means it.
    """

    name: str
    update: Update
    momentum: Options
    relative: Mapping[torch.dtype, float] | None = None
    cosine: float | None = None
    noise: Callable[[torch.Tensor, torch.Tensor, State, Options], float] | None = None
    rounded: tuple[Update, ...] = ()
    matrices: bool = False
    products: bool = False
    elementwise: bool = True
    sparse: bool = False
    signs: bool = False
    found: str = ""
    guessed: bool = False
    inside: Callable[[torch.Tensor, torch.Tensor, State, Options], float] | None = None
    rounds: bool = False
    marks: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """How messages name the rule, and how it was found where the class is not torch's own."""
        return f"{self.name}'s rule ({self.found})" if self.found else f"{self.name}'s rule"


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


def count(state: State, options: Options) -> float:
    """Count the step and return its number, from 1: by the group's own counter where the optimizer keeps it there."""
    before = options.get("step", options.get("k", state.get("step", 0.0)))
    state["step"] = float(before) + 1.0
    return float(state["step"])


def running(state: State, options: Options, name: str, start: float) -> float:
    """Return a number that the optimizer keeps in its group, or the rule's own where no group tells."""
    return float(options.get(name, state.get(name, start)))


def average(state: State, name: str, beta: float, value: torch.Tensor) -> torch.Tensor:
    """Return ``beta * old + (1 - beta) * value`` and keep it; from zeros."""
    state[name] = mean = beta * kept(state, name, value) + (1.0 - beta) * value
    return mean


def decayed(
    gradient: torch.Tensor, theta: torch.Tensor, options: Options, *, decouple: bool, lr: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (gradient, shrink): the decay is in the one or in the other.

    ``weight_decouple`` says which (``decouple`` where there is no such option); ``fixed_decay`` leaves lr out.
    """
    decay = float(options.get("weight_decay") or 0.0)
    none = torch.zeros_like(theta)
    if not decay:
        return gradient, none
    if options.get("weight_decouple", options.get("decoupled_weight_decay", decouple)):
        rate = 1.0 if options.get("fixed_decay") else float(options["lr"]) if lr is None else lr
        return gradient, -rate * decay * theta
    return gradient + decay * theta, none


def refuse(options: Options, *names: str) -> None:
    """Refuse variants that a rule is not written for.

    Raises:
        ValueError: one of the named options is on.
    """
    for name in (*VARIANTS, *names):
        if options.get(name):
            raise ValueError(f"the rule is not written for {name}={options[name]!r}")


#: Switches that packages offer for many of their optimizers, each of which makes another rule.
VARIANTS = ("use_gc", "adanorm", "cautious", "stable_adamw", "adam_debias", "use_palm", "rectify", "ams_bound")
