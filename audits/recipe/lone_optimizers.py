"""No optimizer but the audit's own moves the model while it is audited."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from audits.errors import RecipeError
from audits.recipe.moulds import without_global_hooks

#: Optimizers that the audit built, and those that they hold: a wrapper's base optimizer.
OWN: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()

#: Hooks of `others_refused` that are in force.
_REFUSING: set[Any] = set()


@contextlib.contextmanager
def others_refused(names: Mapping[int, str]) -> Iterator[None]:
    """Stop the step of any optimizer that moves the model and is not the audit's own, before it writes anything.

    A training script may have left hooks on the model that step its live optimizer in every backward.

    Args:
        names: ``id(parameter) -> name`` of the model's parameters.

    Raises:
        RecipeError: out of that optimizer's ``step``; the text names it and the cure.
    """

    def refuse(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        held = (names.get(id(p)) for group in optimizer.param_groups for p in group["params"])
        name = None if optimizer in OWN else next((n for n in held if n is not None), None)
        if name is not None:
            raise RecipeError(
                f"the training step uses an optimizer of its own ({type(optimizer).__name__}, which holds {name!r}): "
                "use context.optimizers['PHASE'], 'step' for a single phase, also in hooks registered on the model"
            )

    with without_global_hooks():
        handle = register_optimizer_step_pre_hook(refuse)
        _REFUSING.add(refuse)
        try:
            yield
        finally:
            handle.remove()
            _REFUSING.discard(refuse)


def foreign_global_hooks() -> bool:
    """Whether a hook that is not the audit's own runs at the step of every optimizer of the process."""
    before, after = torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks
    return any(hook not in _REFUSING for hook in (*before.values(), *after.values()))
