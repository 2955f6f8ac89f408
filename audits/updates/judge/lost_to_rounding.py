"""How much of an update the weights' own spacing swallows."""

from __future__ import annotations

import math

import torch

from audits.updates.judge.slices import squares_apart
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
    lost = float(torch.linalg.vector_norm(stayed_in(call, name, update)))
    return share_of(lost, float(torch.linalg.vector_norm(update)), moved)


def stayed_in(call: Call, name: str, update: torch.Tensor) -> torch.Tensor:
    """Return the update of the elements that stayed where they were, 0 for the others."""
    stayed = call.moved(name) == call.before[name]
    if stayed.dim() < update.dim():
        stayed = stayed.unsqueeze(-1).expand_as(update)
    return torch.where(stayed, update, 0.0) if bool(stayed.any()) else update.new_zeros(())


def share_of(lost: float, whole: float, moved: float) -> float:
    """Return the share of an update's norm that was lost, 0 where the step as a whole does not miss it.

    Args:
        lost: norm of the update of the elements that stayed.
        whole: norm of the update.
        moved: the norm of all that the call moved.
    """
    return 0.0 if lost <= NEWS * math.hypot(moved, lost) else lost / whole


def whole_step(call: Call) -> float:
    """Return the norm of all that a call moved."""
    return math.hypot(*(squares_apart(call.after[n], call.before[n]) for n in call.after))
