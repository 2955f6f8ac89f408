"""What every test shares: no variable of the user's reaches a test, and random generators start the same."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from flows.settings import quiet_defaults

for _name in [name for name in os.environ if name.startswith(("GRADAUDIT_", "MLFLOW_", "PREFECT_"))]:
    del os.environ[_name]
quiet_defaults()
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
