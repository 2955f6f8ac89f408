"""Every check there is, by name."""

from __future__ import annotations

from audits.errors import InputError, suggest
from audits.gradients.claims import GRADIENT_CHECKS
from audits.health import HEALTH_CHECKS
from audits.outcomes import Check
from audits.updates.claims import UPDATE_CHECKS

AUDIT_COMPLETED = Check(
    name="audit.completed",
    claim="The audit ran to its end.",
    threshold="no refusal, crash, time-out or lack of memory",
    blind_to="says nothing about the model: an audit that could not run is inconclusive, never a fail",
    where_to_look="The message names what stopped the audit and the cure.",
)

CHECKS: dict[str, Check] = {
    check.name: check for check in (*GRADIENT_CHECKS, *UPDATE_CHECKS, *HEALTH_CHECKS, AUDIT_COMPLETED)
}


def find_check(name: str) -> Check:
    """Return the check of that name.

    Raises:
        InputError: there is none; the text suggests the nearest.
    """
    if name not in CHECKS:
        raise InputError(f"there is no check {name!r}{suggest(name, CHECKS)} (`gradaudit checks` lists them)")
    return CHECKS[name]
