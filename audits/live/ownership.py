"""Which phase a parameter belongs to, where several optimizers hold it."""

from __future__ import annotations

from collections.abc import Mapping

from audits.globs import matches
from audits.live.subject import Subject


def holders(subject: Subject) -> dict[str, tuple[str, ...]]:
    """Return, for every parameter, the names of the phases whose optimizer holds it."""
    found: dict[str, list[str]] = {name: [] for name in subject.parameters}
    for phase in subject.phases:
        for name in dict.fromkeys(phase.recipe.optimizer.names):
            found[name].append(phase.name)
    return {name: tuple(phases) for name, phases in found.items()}


def has_exclusive(held: Mapping[str, tuple[str, ...]], phase: str) -> bool:
    """Whether a phase's optimizer holds something that no other does."""
    return any(phases == (phase,) for phases in held.values())


def surely_foreign(subject: Subject, phase: str) -> dict[str, tuple[str, ...]]:
    """Return the parameters that a phase's optimizer holds by mistake, each with the phases it belongs to.

    A parameter belongs to one phase unless it is declared ``shared``. Of several optimizers that hold it, that of the
    phase which holds nothing else of its own is the owner's. Where that does not tell, the optimizers were assumed, or
    ``update.isolation`` is to warn alone, nothing is sure.
    """
    if len(subject.phases) < 2 or "optimizer" in subject.recipe.assumed:
        return {}
    if any(matches("update.isolation", glob) and value == "warn" for glob, value in subject.settings.severity.items()):
        return {}
    held, declared = holders(subject), subject.recipe.expect.get("shared") or ()
    if declared is True or not has_exclusive(held, phase):
        return {}
    found = {}
    for name, phases in held.items():
        others = tuple(other for other in phases if other != phase)
        if phase not in phases or not others or matches(name, declared):
            continue
        if not any(has_exclusive(held, other) for other in others):
            found[name] = others
    return found
