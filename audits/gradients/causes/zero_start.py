"""Gradients that are zero only because another parameter starts at zero, LoRA's B say: one note for all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from audits.causes import Cause
from audits.lanes.backward import by_grad_or_backward, gradients_of
from audits.live.subject import LivePhase, Subject
from audits.outcomes import Outcome, ResultRow
from audits.wording import listed

#: The checks that notice an all-zero gradient, the one that says it first.
_NOTICING = ("health.all-zero", "step.gradient-present", "health.vanishing")

#: How far a parameter at zero is moved to see what follows, as rms: a zero-initialised factor after a few steps.
MOVED = 1e-2


def with_one_note(rows: Sequence[ResultRow], subject: Subject) -> list[ResultRow]:
    """Return the rows with all warnings of zero gradients that the initialisation explains told once, as a note.

    Args:
        rows: the audit's rows.
        subject: the open subject; left at its start.
    """
    noticed = [r for r in rows if r.check in _NOTICING[:2] and r.outcome is Outcome.WARN and r.parameter]
    doubtful = {r.parameter for r in noticed}
    if not doubtful:
        return list(rows)
    explained: dict[str, None] = {}
    starting: dict[str, None] = {}
    for phase in subject.phases:
        names, zeros = explained_zeros(subject, phase)
        if found := [n for n in names if n in doubtful]:
            explained.update(dict.fromkeys(found))
            starting.update(dict.fromkeys(zeros))
    speaking = next((r for check in _NOTICING for r in noticed if r.check == check and r.parameter in explained), None)
    told = []
    for r in rows:
        if r is speaking:
            text = f"{listed(explained)}: gradient all zero only because {listed(starting)} start at zero"
            text += "; the first step ends that, nothing needs doing"
            skipped = dataclasses.replace(r, outcome=Outcome.SKIPPED, message=text)
            told.append(dataclasses.replace(skipped, cause=Cause.ZERO_START, where_to_look=None))
        elif r.check in _NOTICING and r.outcome is Outcome.WARN and r.parameter in explained:
            text = f"{r.message}; that is because {listed(starting)} start at zero, and ends with the first step"
            silent = dataclasses.replace(
                r, outcome=Outcome.SKIPPED, cause=Cause.ZERO_START, message=text, where_to_look=None
            )
            told.append(silent)
        else:
            told.append(r)
    return told


def explained_zeros(subject: Subject, phase: LivePhase) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return (parameters whose gradient is zero but would not stay so, parameters at zero that hold it back).

    Those that start at zero and have a gradient are moved against it, as a step would; a gradient that is zero before
    and not after was only waiting for that. A unit that is dead, or a bypassed layer, has none then either.

    Args:
        subject: the open subject; left at its start.
        phase: whose loss.
    """
    try:
        before = _gradients(subject, phase)
        zeros = [n for n, p in phase.parameters.items() if p.numel() and before[n] and not bool(p.detach().any())]
        waiting = [n for n, size in before.items() if size == 0.0 and phase.parameters[n].numel()]
        matrices = [n for n in zeros if phase.parameters[n].dim() > 1]  # biases hold nothing back
        for moved in [some for some in (matrices, zeros) if some and waiting]:
            after = _gradients(subject, phase, move=moved)
            if found := tuple(n for n in waiting if after[n]):
                return found, tuple(moved)
        return (), ()
    except Exception:  # the model's own code: what it raises is said elsewhere
        return (), ()
    finally:
        subject.reset()


def _gradients(subject: Subject, phase: LivePhase, move: Sequence[str] = ()) -> dict[str, float]:
    """Return the norm of each gradient, at the start or with some parameters moved against theirs."""
    found = _differentiated(subject, phase, {})
    if move:
        found = _differentiated(subject, phase, {name: _step_of(found[name]) for name in move})
    return {n: 0.0 if g is None else float(torch.linalg.vector_norm(g.to_dense())) for n, g in found.items()}


def _step_of(gradient: torch.Tensor | None) -> torch.Tensor:
    """Return a step against a gradient that is not zero, of rms `MOVED`."""
    assert gradient is not None
    dense = gradient.to_dense()
    rms = float(torch.linalg.vector_norm(dense)) / dense.numel() ** 0.5
    return dense.mul(-MOVED / rms)


def _differentiated(
    subject: Subject, phase: LivePhase, steps: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor | None]:
    def run(plain: bool) -> tuple[torch.Tensor | None, ...]:
        subject.reset()
        for name, step in steps.items():
            phase.parameters[name].data.add_(step)
        with subject.autocast():
            loss = subject.loss(phase)
        return gradients_of(loss, list(phase.parameters.values()), plain=plain)

    return dict(zip(phase.parameters, by_grad_or_backward(run), strict=True))
