"""Whether a gradient that an optimizer received is a reference gradient: one measure, one threshold."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

import torch

from audits.checks.step import GRADIENT_EPS, GRADIENT_EPS_LOW
from audits.updates.compare import real_dtype, rms, to_double
from audits.updates.update_rows import norm

Gradients = Mapping[str, torch.Tensor | None]

#: In eps of the gradient's dtype.
THRESHOLDS: Mapping[torch.dtype, float] = {
    torch.float64: GRADIENT_EPS.value, torch.float32: GRADIENT_EPS.value,
    torch.bfloat16: GRADIENT_EPS_LOW.value, torch.float16: GRADIENT_EPS_LOW.value,
}  # fmt: skip

#: A gradient that is pure cancellation (a bias before BatchNorm) is noise of the size of its neighbours' rounding.
FLOOR = 0.01


#: Two draws of one scatter lie alike apart; four times the larger of two bounds a third.
SCATTER_FACTOR = 4.0

#: ``dtype -> (threshold, floor)`` of a gradient of some dtype.
Allowed = Callable[[torch.dtype], tuple[float, float]]


def plain(dtype: torch.dtype) -> tuple[float, float]:
    """Return threshold and floor where products run in the gradients' own dtype."""
    return THRESHOLDS[dtype], FLOOR


def gradient_error(
    got: torch.Tensor | None, meant: torch.Tensor | None, like: torch.Tensor, scale: float, floor: float = FLOOR,
    scatter: float = 0.0,
) -> float:  # fmt: skip
    """Return ``rms(got - meant) / (eps (rms(meant) + floor scale))``, to be held against a threshold.

    Args:
        got: the received gradient; None counts as zeros.
        meant: the reference gradient; None counts as zeros.
        like: the parameter, for its shape and dtype.
        scale: rms of the phase's whole gradient.
        floor: share of it that counts as a gradient's own size.
        scatter: rms distance of two evaluations of the reference; `SCATTER_FACTOR` times it is taken off.
    """
    one = torch.zeros_like(like) if got is None else got.to_dense()
    other = torch.zeros_like(like) if meant is None else meant.to_dense()
    if torch.equal(one, other.to(one.dtype)):
        return 0.0
    difference = max(rms(to_double(one) - to_double(other)) - SCATTER_FACTOR * scatter, 0.0)
    room = torch.finfo(real_dtype(like.dtype)).eps * (rms(to_double(other)) + floor * scale)
    return difference / room if room else float("inf")


def agrees(
    wanted: Gradients, received: Gradients, parameters: Mapping[str, torch.Tensor], names: Collection[str],
    allowed: Allowed = plain,
) -> bool:  # fmt: skip
    """Whether every named parameter received the wanted gradient within its threshold."""
    scale = global_rms(wanted, names)

    def agreeing(name: str) -> bool:
        threshold, floor = allowed(real_dtype(parameters[name].dtype))
        return gradient_error(received.get(name), wanted.get(name), parameters[name], scale, floor) <= threshold

    return all(agreeing(n) for n in names if not (received.get(n) is None and wanted.get(n) is None))


def scattered(one: Gradients, other: Gradients, names: Collection[str]) -> dict[str, float]:
    """Return the rms distance of two evaluations of the named gradients, where they differ."""
    found = {}
    for name in names:
        a, b = one.get(name), other.get(name)
        if a is not None and b is not None and not torch.equal(a := a.to_dense(), b := b.to_dense()):
            found[name] = rms(to_double(a) - to_double(b))
    return found


def distance(wanted: Gradients, received: Gradients, names: Collection[str], left: Gradients | None = None) -> float:
    """Return the relative distance of ``wanted`` plus what was ``left`` over to ``received``, over all the names."""
    difference = size = 0.0
    for name in names:
        gradient, other = received.get(name), wanted.get(name)
        if gradient is None and other is None:
            continue
        a, b = (None if g is None else g.to_dense() for g in (gradient, other))
        a = torch.zeros_like(b) if a is None else a  # type: ignore[arg-type]
        b = torch.zeros_like(a) if b is None else b
        if left is not None and (more := left.get(name)) is not None:
            b = b + more.to_dense()
        difference += norm(to_double(a) - to_double(b)) ** 2
        size += norm(b) ** 2
    return (difference / size) ** 0.5 if size else (float("inf") if difference else 0.0)


def added(gradients: Iterable[torch.Tensor | None]) -> torch.Tensor | None:
    """Return the sum of the gradients there are, dense; None where there is none."""
    found = [g.to_dense() for g in gradients if g is not None]
    return torch.stack(found).sum(0) if found else None


def global_rms(gradients: Gradients, names: Collection[str]) -> float:
    """Return the rms over all elements of the named gradients."""
    count, size = 0, 0.0
    for name in names:  # one after the other: they may wait in host memory
        if (gradient := gradients.get(name)) is not None:
            count, size = count + gradient.numel(), size + norm(gradient) ** 2
            del gradient
    return (size / count) ** 0.5 if count else 0.0
