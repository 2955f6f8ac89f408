"""Models in an MLflow registry: logged with a recipe, snapshot, loaded, published, marked. Knows no Prefect.

The public names are imported on first use: an audit's child process imports this package and needs no MLflow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from registry_models.logging_models import attach_recipe, log_model

__all__ = ["attach_recipe", "log_model"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        try:
            from registry_models import logging_models
        except ModuleNotFoundError as error:
            from audits.parts import missing_part

            raise missing_part(error) or error from error

        return getattr(logging_models, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
