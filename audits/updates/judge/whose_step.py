"""Whose code an optimizer's step is: torch's own, for which the environment answers, or the user's."""

from __future__ import annotations

import torch

from audits.live.subject import LivePhase
from audits.recipe.constructing import optimizer_class
from audits.recipe.moulds import patched_step


def torch_owned(phase: LivePhase) -> bool:
    """Whether all that happens in the optimizer's ``step`` is torch.optim's own code."""
    kept = phase.recipe.optimizer.kept
    if kept is not None and kept.replaced:
        return False
    for cls in optimizer_class(phase.recipe.optimizer).__mro__:
        if getattr(torch.optim, cls.__name__, None) is cls:
            return patched_step(cls) is None
        if any(callable(value) and name != "__init__" for name, value in vars(cls).items()):
            return False  # torch's step calls methods (`_init_group`) that a subclass may have made its own
    return False
