"""The random generators of torch, NumPy and Python: remembered, put back, seeded."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from audits.devices import GeneratorStates, generator_states, set_generator_states


@dataclass(frozen=True)
class RandomState:
    """The state of torch's (CPU and any device in use), NumPy's and Python's global generators."""

    cpu: torch.Tensor
    devices: GeneratorStates
    numpy: Any
    python: Any

    @classmethod
    def now(cls) -> RandomState:
        """Remember the generators as they are."""
        return cls(torch.get_rng_state(), generator_states(), np.random.get_state(), random.getstate())

    def restore(self) -> None:
        """Put the generators back."""
        torch.set_rng_state(self.cpu)
        set_generator_states(self.devices)
        np.random.set_state(self.numpy)
        random.setstate(self.python)


def seed_everything(seed: int) -> None:
    """Seed torch, NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Leave the random generators as they were."""
    state = RandomState.now()
    try:
        yield
    finally:
        state.restore()
