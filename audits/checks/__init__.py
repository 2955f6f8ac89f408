"""Every check there is, by name."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

from audits.checks.gradient import COMPILED, GRADIENT_CHECKS
from audits.checks.health import HEALTH_CHECKS
from audits.checks.update import UPDATE_CHECKS
from audits.errors import InputError, SettingsError, suggest
from audits.outcomes import Check, Severity

AUDIT_COMPLETED = Check(
    name="audit.completed",
    claim="The audit ran to its end.",
    threshold="no refusal, crash, time-out or lack of memory",
    blind_to="says nothing about the model: an audit that could not run is inconclusive, never a fail",
    where_to_look="The message names what stopped the audit and the cure.",
)

MODEL_WHOLE = Check(
    name="model.whole",
    claim="The version holds the model itself, with its own backward functions, hooks, ties and modes.",
    severity=Severity.WARN,
    threshold="holds for every artifact kind but an exported graph (pt2)",
    blind_to="of an exported graph, custom backward functions and hooks cannot be audited at all",
    where_to_look="Log the model with a factory: registry_models.log_model(model, NAME, recipe=..., factory=...).",
)

RECIPE_DECLARED = Check(
    name="recipe.declared",
    claim="The loss, the optimizer and the batch are what somebody declared, or the model's own.",
    severity=Severity.WARN,
    threshold="no loss and no optimizer is assumed",
    blind_to="whether what was declared is what the training script really did",
    where_to_look="Attach a recipe: registry_models.attach_recipe(VERSION, Recipe.capture(...)).",
)

RECIPE_TRUSTED = Check(
    name="recipe.trusted",
    claim="What excuses parameters from the audit was not put there by a tag.",
    severity=Severity.WARN,
    threshold="stop_gradient, frozen parameters and lenient expectations come with the version or are trusted",
    blind_to="who set the tag",
    where_to_look="The message names the fields; register the version with its recipe, or trust it in the recipes "
    "folder.",
)

#: About the version and its recipe rather than the model; `registry_models` judges them.
VERSION_CHECKS = (MODEL_WHOLE, RECIPE_DECLARED, RECIPE_TRUSTED)

CHECKS: dict[str, Check] = {
    check.name: check
    for check in (*GRADIENT_CHECKS, COMPILED, *UPDATE_CHECKS, *HEALTH_CHECKS, AUDIT_COMPLETED, *VERSION_CHECKS)
}


def find_check(name: str) -> Check:
    """Return the check of that name.

    Raises:
        InputError: there is none; the text suggests the nearest.
    """
    if name not in CHECKS:
        raise InputError(f"there is no check {name!r}{suggest(name, CHECKS)} (`gradaudit checks` lists them)")
    return CHECKS[name]


def refuse_unknown_checks(globs: Iterable[str]) -> None:
    """Refuse names and globs that no check has: what looks at nothing finds nothing.

    Raises:
        SettingsError: the text names the glob and the nearest check.
    """
    for glob in globs:
        if not any(fnmatch.fnmatchcase(name, glob) for name in CHECKS):
            raise SettingsError(f"there is no check {glob!r}{suggest(glob, CHECKS)} (`gradaudit checks` lists them)")
