"""Correct models of ordinary kinds: all of them in `ORDINARY`, by name."""

from benchmarks.models.ordinary import layers, objectives, pictures, sequences
from benchmarks.models.ordinary.kinds import ORDINARY

__all__ = ["ORDINARY", "layers", "objectives", "pictures", "sequences"]
