"""Optimizers with modes of their own, as Schedule-Free's: the weights they train are not those they are judged by."""

from __future__ import annotations

from typing import Any

import torch


def in_train_mode(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Call the optimizer's own ``train()``, where it has one, as its training script does; return the optimizer."""
    if callable(train := getattr(optimizer, "train", None)):
        train()
    return optimizer


def options_of_train_mode(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put an optimizer in train mode and return the group options by which it knows (Schedule-Free's ``train_mode``).

    A recipe captured before the first ``train()`` records them as they were then.
    """
    before = [dict(group) for group in optimizer.param_groups]
    in_train_mode(optimizer)
    groups = zip(optimizer.param_groups, before, strict=True)
    return {k: v for group, old in groups for k, v in group.items() if isinstance(v, bool) and old.get(k) is not v}
