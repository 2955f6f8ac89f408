"""How much of an update the weights' own spacing swallows."""

from __future__ import annotations

import torch

from audits.updates.compare import real_dtype
from audits.updates.compare import to_double as double
from audits.updates.recorder import Call

#: Share of the update's norm that may be lost: what is left then makes an angle of asin(0.5) = 30 degrees with what is
#: meant. bfloat16 weights whose learning rate is too small for them lose nearly all (their spacing is 2^-8 of
#: themselves, an Adam step of 1e-5 of weights around 0.05 a fortieth of that); healthy float32 nets lose below 1e-3.
LOST_SHARE = 0.5

#: A gradient below so many eps of the largest tensor's rms is what sums leave that are zero (a bias before a
#: BatchNorm): 64 as in the native-dtype check, a sum done in another order.
ROUNDING = 64.0


def lost_share(call: Call, name: str, update: torch.Tensor, largest: float) -> float:
    """Return ``norm(update of the elements that stayed) / norm(update)``, gradients that are rounding zeros left out.

    Args:
        call: the optimizer's step.
        name: the parameter.
        update: the rule's update in float64, pairs of reals for complex weights.
        largest: the largest rms of the call's gradients (`largest_gradient`).
    """
    gradient = call.gradients[name]
    stayed = call.moved(name) == call.before[name]
    if stayed.dim() < update.dim():
        stayed = stayed.unsqueeze(-1).expand_as(update)
    if gradient is None or not bool(stayed.any()):
        return 0.0
    received = double(gradient.to_dense()).abs()
    floor = ROUNDING * torch.finfo(real_dtype(call.before[name].dtype)).eps * largest
    # an exact zero is no rounding zero: momentum or decay may move it all the same
    meant = torch.where((received > floor) | (received == 0), update, 0.0)
    total = float(torch.linalg.vector_norm(meant))
    return float(torch.linalg.vector_norm(torch.where(stayed, meant, 0.0))) / total if total else 0.0


def largest_gradient(call: Call) -> float:
    """Return the largest rms of the gradients that a call received."""
    found = [0.0]
    for gradient in call.gradients.values():
        if gradient is not None and gradient.numel():
            values = gradient.coalesce().values() if gradient.is_sparse else gradient
            found.append(float(torch.linalg.vector_norm(values)) / gradient.numel() ** 0.5)
    return max(found)
