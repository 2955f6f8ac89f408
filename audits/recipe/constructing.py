"""What an optimizer's class makes of recorded options, and the mould that a recorded optimizer is cast from."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence

import torch
from torch import nn

from audits.errors import RecipeError
from audits.random_state import random_state_kept
from audits.recipe.attributes import CONSTRUCTED, from_plain
from audits.recipe.callables import import_object
from audits.recipe.copying import SAME, Copier
from audits.recipe.moulds import mould_of
from audits.recipe.phases import OptimizerRecipe


def optimizer_class(recipe: OptimizerRecipe) -> type[torch.optim.Optimizer]:
    """Return the optimizer's class.

    Raises:
        RecipeError: it cannot be imported, or is no optimizer.
    """
    found = recipe.live_class or import_object(recipe.class_path, role="optimizer class")
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise RecipeError(f"optimizer class {recipe.class_path!r} is not a torch.optim.Optimizer")
    return found


def constructed(recipe: OptimizerRecipe, held: Sequence[Sequence[torch.Tensor]]) -> torch.optim.Optimizer:
    """Return what the class's constructor makes of the recorded groups and defaults.

    Raises:
        RecipeError: the constructor refuses them.
    """
    cls = optimizer_class(recipe)
    groups = [{**dict(g.options), "params": list(own)} for g, own in zip(recipe.groups, held, strict=True)]
    try:
        accepted = inspect.signature(cls.__init__).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
        arguments = {name: value for name, value in recipe.defaults.items() if open_ended or name in accepted}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of duplicates; registration.duplicate judges them
            return cls(groups, **arguments)
    except Exception as error:  # the class is the user's: whatever it raises is its answer
        raise RecipeError(
            f"optimizer {recipe.class_path} cannot be rebuilt from its recorded options: {error}"
        ) from error


def mould_of_recipe(recipe: OptimizerRecipe) -> torch.optim.Optimizer | None:
    """Return what the optimizer is cast from; None where class, options and state are all that is recorded.

    Raises:
        RecipeError: the class, a hook or another function cannot be imported.
    """
    kept = recipe.kept
    if kept is None or (kept.mould is None and kept.attributes is None):
        return None
    if kept.mould is None:
        assert kept.attributes is not None
        kept.mould = from_plain(kept.attributes, optimizer_class(recipe))
        names = kept.attributes.get(CONSTRUCTED) or ()
        twin = twin_of(recipe) if names else None
        if names and twin is None:
            raise RecipeError(
                f"optimizer {recipe.class_path}: its constructor is to make {', '.join(names)}, and fails"
            )
        for name in names:
            value = Copier(lambda given: kept.mould if given is twin else SAME, torch.clone).value(getattr(twin, name))
            object.__setattr__(kept.mould, name, value)
    return kept.mould


def twin_of(recipe: OptimizerRecipe) -> torch.optim.Optimizer | None:
    """Return what the constructor makes of the recorded options on small tensors, as a mould; None if it fails."""
    small = [[nn.Parameter(torch.zeros(2)) for _ in group.parameters] for group in recipe.groups]
    labels = {id(tensor): f"small.{i}" for i, tensor in enumerate(tensor for own in small for tensor in own)}
    try:
        with random_state_kept():
            return mould_of(constructed(recipe, small), labels)
    except RecipeError:
        return None
