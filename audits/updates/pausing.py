"""What listens to a training step is paused while the audit itself evaluates the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class Pausable:
    """A listener that can be paused, also while it is paused already."""

    is_paused = False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not listen inside the block."""
        before, self.is_paused = self.is_paused, True
        try:
            yield
        finally:
            self.is_paused = before
