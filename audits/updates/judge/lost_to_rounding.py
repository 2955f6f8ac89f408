"""How much of an update the weights' own spacing swallows."""

from __future__ import annotations

import math

import torch

from audits.updates.compare import to_double as double
from audits.updates.record.calls import Call

#: A loss below this share of the whole step is no news: it turns the step by half a degree. So are a bias before a
#: BatchNorm, whose gradient is rounding, and LoRA's A in the second step, while B is all but zero.
NEWS = 1e-2


def lost_share(call: Call, name: str, update: torch.Tensor, moved: float) -> float:
    """Return ``norm(update of the elements that stayed) / norm(update)``, 0 where the step as a whole does not miss it.

    Args:
        call: the optimizer's step.
        name: the parameter.
        update: the rule's update in float64, pairs of reals for complex weights.
        moved: the norm of all that the call moved (`whole_step`).
    """
    stayed = call.moved(name) == call.before[name]
    if stayed.dim() < update.dim():
        stayed = stayed.unsqueeze(-1).expand_as(update)
    if not bool(stayed.any()):
        return 0.0
    lost = float(torch.linalg.vector_norm(torch.where(stayed, update, 0.0)))
    if lost <= NEWS * math.hypot(moved, lost):
        return 0.0
    return lost / float(torch.linalg.vector_norm(update))


def whole_step(call: Call) -> float:
    """Return the norm of all that a call moved."""
    return math.hypot(
        *(float(torch.linalg.vector_norm(double(after) - double(call.before[n]))) for n, after in call.after.items())
    )
