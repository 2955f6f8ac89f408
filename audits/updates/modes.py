"""Optimizers with modes of their own, as Schedule-Free's: the weights they train are not those they are judged by."""

from __future__ import annotations

import torch


def in_train_mode(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Call the optimizer's own ``train()``, where it has one, as its training script does; return the optimizer."""
    if callable(train := getattr(optimizer, "train", None)):
        train()
    return optimizer
