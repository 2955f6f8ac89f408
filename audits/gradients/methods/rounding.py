"""Gradients that are zero in exact arithmetic and rounding noise in floating point."""

from __future__ import annotations

from collections.abc import Sequence

from audits.gradients.methods.probe import rms
from audits.lanes.evaluation import Point

#: Displacement, relative per element, that replaces rounding noise by other rounding noise ...
NUDGE = 1e-9

#: ... but never below so many roundoffs of the lane, or nothing would move in float32.
NUDGE_ROUNDOFFS = 1e3

#: ... and leaves a true gradient the same to far better than this share of its norm.
ROUNDING_SHARE = 0.1

#: Gradients this small beside the largest (times the tensors' sizes) are worth the second backward. Rounding of a
#: cancelling sum stands at about 1e-16 of its terms; 1e-6 leaves room for ill-conditioned nets.
SUSPICIOUS = 1e-6


def mark_rounding_zeros(point: Point, names: Sequence[str]) -> None:
    """Add to ``point.rounded`` the tensors whose gradient is nothing but rounding noise.

    A bias before a BatchNorm has the derivative 0, and autograd gives 1e-18. Nothing bounds the error of that number:
    it counts as the zero it stands for: the finite difference must be zero within its bound. Noise is told from a small
    gradient by a second backward at ``theta (1 + 1e-9)``: noise changes entirely, a gradient hardly.

    Args:
        point: where.
        names: tensors to look at; exact zeros among them are left alone.
    """
    doubtful = [n for n in names if n not in point.rounded and point.gradients.norms[n] > 0.0]
    if not doubtful:
        return
    changes = point.gradients.changes_nearby(doubtful, max(NUDGE, NUDGE_ROUNDOFFS * point.problem.roundoff))
    point.rounded |= {n for n in doubtful if changes[n] > ROUNDING_SHARE * point.gradients.norms[n]}


def suspicious(point: Point, names: Sequence[str]) -> list[str]:
    """Return the tensors whose gradient may be rounding noise, by its size alone."""
    slopes = {n: point.gradients.norms[n] * rms(point.count(n), point.theta_norms[n]) for n in point.names}
    largest = max(slopes.values(), default=0.0)
    return [name for name in names if 0.0 < slopes[name] <= SUSPICIOUS * largest]
