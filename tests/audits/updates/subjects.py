"""Small helpers: audit a live model and look at the rows."""

from __future__ import annotations

from typing import Any

from torch import nn

from audits.live.subject import open_subject
from audits.outcomes import Outcome, ResultRow
from audits.recipe.recipe import Recipe
from audits.settings import AuditSettings
from audits.updates import check_registration, check_updates


def audited(model: nn.Module, settings: AuditSettings | None = None, **arguments: Any) -> list[ResultRow]:
    recipe = Recipe.capture(model, **arguments)
    with open_subject(model, recipe, settings, device="cpu") as subject:
        return check_registration(subject) + check_updates(subject)


def failed(rows: list[ResultRow]) -> list[tuple[str, str | None]]:
    return [(r.check, r.parameter) for r in rows if r.outcome is Outcome.FAIL]


def of(rows: list[ResultRow], check: str, parameter: str | None = None) -> list[ResultRow]:
    return [r for r in rows if r.check == check and (parameter is None or r.parameter == parameter)]
