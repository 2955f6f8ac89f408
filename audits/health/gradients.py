"""Gradients that vanish along the depth, explode, or are all zero."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator

import torch

from audits.checks.health import VANISHING_MEAN
from audits.health.health_rows import health_row
from audits.health.moves import Move, harms
from audits.live.subject import LivePhase, Subject
from audits.outcomes import ResultRow, finite
from audits.updates.compare import to_double


def gradient_rows(
    subject: Subject,
    phase: LivePhase,
    gradients: dict[str, torch.Tensor | None],
    moves: dict[str, Move],
    order: Iterable[str],
) -> Iterator[ResultRow]:
    """Yield ``health.exploding``, ``health.all-zero`` and ``health.vanishing``.

    Args:
        subject: the model under audit.
        phase: the phase.
        gradients: of its parameters.
        moves: what its step does to each weight.
        order: the parameters in the order of the forward.
    """
    norms = {}
    for name, gradient in gradients.items():
        if gradient is None:
            continue
        values = gradient.coalesce().values() if gradient.is_sparse else gradient
        size = float(torch.linalg.vector_norm(to_double(values).reshape(-1))) if values.numel() else 0.0
        norms[name] = size
        yield _exploding(subject, phase, name, size, moves.get(name))
        zero = bool(values.numel()) and not size
        yield health_row(subject, "health.all-zero", zero, f"{name}: gradient {'all zero' if zero else 'not all zero'}",
                   phase=phase.name, parameter=name, gradient_norm=finite(size))  # fmt: skip
    yield from _vanishing(subject, phase, norms, order)


def _exploding(subject: Subject, phase: LivePhase, name: str, size: float, move: Move | None) -> ResultRow:
    limit = subject.settings.exploding_norm
    bad = finite(size) is None or (size > limit and harms(phase, move))
    message = f"{name}: gradient norm {size:.3g}"
    if bad and finite(size) is not None and move is not None:
        message += f", and a step moves it by {move.ratio:.1%} of itself"
    return health_row(subject, "health.exploding", bad, message, phase=phase.name, parameter=name,
                      measured=finite(size), threshold=limit, gradient_norm=finite(size))  # fmt: skip


def _vanishing(
    subject: Subject, phase: LivePhase, norms: dict[str, float], order: Iterable[str]
) -> Iterator[ResultRow]:  # fmt: skip
    """Yield the rows on gradients that vanish from the last weight to the first, or everywhere."""
    weights = [n for n in order if n in norms and subject.parameters[n].dim() > 1]
    if len(weights) > 1 and norms[weights[-1]]:
        first, last = weights[0], weights[-1]
        ratio = norms[first] / norms[last]
        middle = len(weights) // 2
        before, after = (statistics.median(norms[n] for n in half) for half in (weights[:middle], weights[middle:]))
        bad = (
            before < after
            and ratio < subject.settings.vanishing_ratio
            and norms[first] < subject.settings.vanishing_norm
        )
        message = f"the gradient's norm is {norms[first]:.3g} at {first} and {norms[last]:.3g} at {last}"
        yield health_row(subject, "health.vanishing", bad, message, phase=phase.name, parameter=first, measured=ratio,
                   threshold=subject.settings.vanishing_ratio, gradient_norm=norms[first])  # fmt: skip
    means = {n: norms[n] / max(1, subject.parameters[n].numel()) ** 0.5 for n in norms}
    if means and 0 < max(means.values()) < VANISHING_MEAN.value:
        name = max(means, key=lambda n: means[n])
        message = (
            f"every gradient is below {VANISHING_MEAN.value:g} per element; the largest is {name}'s, {means[name]:.3g}"
        )
        yield health_row(subject, "health.vanishing", True, message, phase=phase.name, measured=means[name],
                   threshold=VANISHING_MEAN.value)  # fmt: skip
