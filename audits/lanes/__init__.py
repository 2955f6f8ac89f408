"""How a subject is evaluated: lifted to float64, randomness taped, branches frozen, everything restored in between."""

from audits.lanes.evaluation import Point
from audits.lanes.float64 import float64_lane
from audits.lanes.problem import LaneError, Problem
from audits.lanes.program import BranchMismatchError

__all__ = ["BranchMismatchError", "LaneError", "Point", "Problem", "float64_lane"]
