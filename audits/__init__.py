"""Whether a PyTorch model can be trained correctly: gradients and updates, judged per parameter.

Knows torch, NumPy and Arrow; knows no registry, no scheduler, no network and no environment variable.
"""

from audits.errors import GradauditError, InfrastructureError, InputError, RecipeError, SettingsError
from audits.outcomes import Outcome, ResultRow, Severity
from audits.recipe import Phase, Recipe
from audits.report import AuditReport
from audits.run import audit
from audits.settings import AuditSettings

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
