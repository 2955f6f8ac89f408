"""How a subject is evaluated: lifted to float64, randomness taped, branches frozen, everything restored in between."""

from audits.lanes.evaluation import BranchMismatchError, LaneError, Point, Problem
from audits.lanes.float64 import float64_lane

__all__ = ["BranchMismatchError", "LaneError", "Point", "Problem", "float64_lane"]
