"""The audit itself, and the version with its recipe: what `registry_models` judges."""

from __future__ import annotations

from audits.checks.check import Check
from audits.outcomes import Severity

AUDIT_COMPLETED = Check(
    name="audit.completed",
    unmet="the audit did not come to its end",
    claim="The audit ran to its end.",
    bound="no refusal, crash, time-out or lack of memory",
    blind_to="says nothing about the model: an audit that could not run is inconclusive, never a fail",
    where_to_look="The message names what stopped the audit and the cure.",
)

MODEL_WHOLE = Check(
    name="model.whole",
    unmet="the version holds a graph, not the model itself",
    claim="The version holds the model itself, with its own backward functions, hooks, ties and modes.",
    severity=Severity.WARN,
    bound="holds for every artifact kind but an exported graph (pt2)",
    blind_to="of an exported graph, custom backward functions and hooks cannot be audited at all",
    where_to_look="Log the model with a factory: registry_models.log_model(model, NAME, recipe=..., factory=...).",
)

RECIPE_DECLARED = Check(
    name="recipe.declared",
    unmet="the loss or the optimizer is assumed",
    claim="The loss, the optimizer and the batch are what somebody declared, or the model's own.",
    severity=Severity.WARN,
    bound="no loss and no optimizer is assumed",
    blind_to="whether what was declared is what the training script really did",
    where_to_look="Attach a recipe: registry_models.attach_recipe(VERSION, Recipe.capture(...)).",
)

RECIPE_TRUSTED = Check(
    name="recipe.trusted",
    unmet="a tag excuses parameters from the audit",
    claim="What excuses parameters from the audit was not put there by a tag.",
    severity=Severity.WARN,
    bound="stop_gradient, frozen parameters and lenient expectations come with the version or are trusted",
    blind_to="who set the tag",
    where_to_look="The message names the fields; register the version with its recipe, or trust it in the recipes "
    "folder.",
)

CHECKS = (AUDIT_COMPLETED, MODEL_WHOLE, RECIPE_DECLARED, RECIPE_TRUSTED)
