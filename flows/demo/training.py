"""What every training script of the demo gives back, and the little they share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from audits.recipe.recipe import Recipe


@dataclass(frozen=True)
class TrainedModel:
    """A trained model and what is needed to register it.

    Attributes:
        model: the trained module.
        recipe: how it is trained, captured from the live objects at the end of training.
        losses: the training loss of every step.
        factory: import path of the function that builds the module; None registers a pickle.
        factory_args: the factory's keyword arguments.
        metrics: what else was measured at the end.
        hyperparameters: what the training run logs as its parameters.
    """

    model: nn.Module
    recipe: Recipe
    losses: tuple[float, ...]
    factory: str | None = None
    factory_args: Mapping[str, int | float | bool | str] | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    hyperparameters: Mapping[str, int | float | str] = field(default_factory=dict)

    @property
    def final_loss(self) -> float:
        """The training loss of the last step."""
        return self.losses[-1]


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator and compute on one thread; generator and threads are as before afterwards.

    Models this small gain nothing from a second thread, and on one thread every machine adds up in the same order.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)
