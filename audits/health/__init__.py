"""Health of the gradients and of the step: vanishing, exploding, dead, saturated. Never more than a warning."""

from __future__ import annotations

import functools

import torch

from audits.checks.health import CHECKS
from audits.health.activations import Listener
from audits.health.gradients import gradient_rows
from audits.health.moves import moves_of, update_rows
from audits.lanes.backward import by_grad_or_backward, gradients_of
from audits.live.subject import LivePhase, Subject
from audits.outcomes import ResultRow

__all__ = ["check_health"]


def check_health(subject: Subject) -> list[ResultRow]:
    """Return the rows of ``health.*``: one gradient evaluation and one optimizer step per phase.

    Args:
        subject: the model under audit; left at its start.
    """
    if not subject.settings.wants_check(*(check.name for check in CHECKS)):
        return []
    rows: list[ResultRow] = []
    try:
        for phase in subject.phases:
            activity = Listener(subject)
            gradients = by_grad_or_backward(functools.partial(_evaluate, subject, phase, activity))
            moves = moves_of(phase, gradients)
            rows += gradient_rows(subject, phase, gradients, moves, activity.order)
            rows += activity.rows(phase)
            rows += update_rows(subject, phase, moves)
    finally:
        subject.reset()
    return [
        r for r in rows
        if subject.settings.wants_check(r.check)
        and (r.parameter is None or subject.settings.wants_parameter(r.parameter))
    ]  # fmt: skip


def _evaluate(subject: Subject, phase: LivePhase, activity: Listener, plain: bool) -> dict[str, torch.Tensor | None]:
    subject.reset()
    with activity.listening(), subject.autocast():
        loss = subject.loss(phase)
    found = gradients_of(loss, list(phase.parameters.values()), plain=plain)
    return dict(zip(phase.parameters, found, strict=True))
