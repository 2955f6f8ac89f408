"""How a subject is evaluated: lifted to float64, randomness taped, branches frozen, everything restored in between."""

from audits.lanes.evaluation import Point
from audits.lanes.lifted_loss import lifted_loss
from audits.lanes.problem import LaneError, Problem
from audits.lanes.program import BranchMismatchError

__all__ = ["BranchMismatchError", "LaneError", "Point", "Problem", "lifted_loss"]
