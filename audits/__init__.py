"""Whether a PyTorch model can be trained correctly: gradients and updates, judged per parameter.

Knows torch, NumPy and Arrow; knows no registry, no scheduler, no network and no environment variable. The public names
are imported on first use, so that a command that needs no torch does not wait for it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from audits.errors import GradauditError, InfrastructureError, InputError, RecipeError, SettingsError
    from audits.outcomes import Outcome, ResultRow, Severity
    from audits.recipe.phases import Phase
    from audits.recipe.recipe import Recipe
    from audits.report import AuditReport
    from audits.run import audit
    from audits.settings import AuditSettings

_HOMES = {
    "AuditReport": "report",
    "AuditSettings": "settings",
    "GradauditError": "errors",
    "InfrastructureError": "errors",
    "InputError": "errors",
    "Outcome": "outcomes",
    "Phase": "recipe.phases",
    "Recipe": "recipe.recipe",
    "RecipeError": "errors",
    "ResultRow": "outcomes",
    "SettingsError": "errors",
    "Severity": "outcomes",
    "audit": "run",
}

__all__ = [
    "AuditReport",
    "AuditSettings",
    "GradauditError",
    "InfrastructureError",
    "InputError",
    "Outcome",
    "Phase",
    "Recipe",
    "RecipeError",
    "ResultRow",
    "SettingsError",
    "Severity",
    "audit",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"audits.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
