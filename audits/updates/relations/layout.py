"""The tensors and param groups on which an optimizer is run: small ones of the model's kinds, in its own groups."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from audits.live.subject import LivePhase, Subject
from audits.recipe.constructing import optimizer_class
from audits.recipe.phases import OptimizerRecipe
from audits.updates.relations.bench import COUNTS, Group
from audits.updates.relations.bench_loss import Leaf, leaf

#: Distinct option sets that are run: layer-wise rates repeat the same code.
MAX_GROUPS = 3

#: Elements of a model whose own tensors are run where the small ones cannot be.
LARGEST_OWN = 2**16

#: One small shape for each number of dimensions; no dimension divides another, so that none passes for another.
SHAPES: dict[int, tuple[int, ...]] = {0: (), 1: (7,), 2: (6, 4), 3: (3, 4, 2), 4: (3, 2, 2, 3), 5: (2, 3, 2, 2, 2)}


@dataclass(frozen=True)
class Layout:
    """The groups, the tensors, and the kinds of tensors (numbers of dimensions) that each group holds."""

    groups: tuple[Group, ...]
    leaves: dict[str, Leaf]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, in order."""
        return tuple(name for group in self.groups for name in group.names)


def fresh_options(recipe: OptimizerRecipe, options: dict[str, Any]) -> dict[str, Any]:
    """Return a group's options as its user set them, without what the optimizer counts in them as it steps.

    What is in the defaults and no argument of the constructor is such a count (Schedule-Free's ``weight_sum``).
    """
    arguments = inspect.signature(optimizer_class(recipe).__init__).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in arguments.values())
    return {
        key: value
        for key, value in options.items()
        if key in arguments or (key not in COUNTS and (open_ended or key not in recipe.defaults))
    }


def own_layout(subject: Subject, phase: LivePhase, seed: int) -> Layout | None:
    """Return tensors of the model's own shapes in their own order, for rules that pair them; None for large models."""
    generator = torch.Generator().manual_seed(seed)
    recipe = phase.recipe.optimizer
    if sum(subject.parameters[n].numel() for n in recipe.names) > LARGEST_OWN:
        return None
    held = [(dict(g.options), tuple(n for n in g.parameters if isinstance(n, str))) for g in recipe.groups]
    groups = tuple(Group(fresh_options(recipe, options), names) for options, names in held if names)
    return Layout(groups, {n: leaf(tuple(subject.parameters[n].shape), generator) for g in groups for n in g.names})


def layout(subject: Subject, phase: LivePhase, seed: int) -> Layout:
    """Return two tensors of each kind that a group of the phase's optimizer holds, group by group.

    Args:
        subject: for the kinds of its parameters.
        phase: whose optimizer.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    recipe = phase.recipe.optimizer
    groups: list[Group] = []
    leaves: dict[str, Leaf] = {}
    seen: list[tuple[dict[str, Any], set[int]]] = []
    for group in recipe.groups:
        options = fresh_options(recipe, dict(group.options))
        if not options.get("lr", 1.0):  # a schedule at 0 shows nothing: the rate it started from
            options["lr"] = options.get("initial_lr") or recipe.defaults.get("lr") or 1e-3
        kinds = {subject.parameters[n].dim() for n in group.parameters if isinstance(n, str)}
        if not kinds or any(options == known and kinds <= had for known, had in seen) or len(groups) >= MAX_GROUPS:
            continue
        seen.append((options, kinds))
        names = []
        for kind in sorted(kinds, reverse=True):
            for twin in "ab":
                name = f"group {len(groups)}, {kind}-d {twin}"
                leaves[name] = leaf(SHAPES.get(kind, (2,) * kind), generator)
                names.append(name)
        groups.append(Group(options, tuple(names)))
    return Layout(tuple(groups), leaves)
