"""Autograd's gradient of the loss is the derivative of the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from audits.live.subject import Subject
    from audits.outcomes import ResultRow

__all__ = ["check_gradients"]


def check_gradients(subject: Subject) -> list[ResultRow]:
    """Check that autograd's gradients are the derivatives of the losses; `audits.gradients.check` documents it."""
    # imported here so that `audits.checks.gradient`, which the list of checks reads, comes without torch
    from audits.gradients.check import check_gradients as check

    return check(subject)
