"""Register a model so that it can be audited: MLflow's own pytorch flavour, with a recipe and a factory beside it."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlflow.pytorch
from mlflow.models.model import ModelInfo
from mlflow.tracking import MlflowClient
from torch import nn

from audits.callables import CallableReference
from audits.capture import unwrap
from audits.errors import ArtifactError
from audits.recipe import Recipe
from registry_models.factory_files import Factory, write_factory
from registry_models.recipe_files import FOLDER, write_recipe
from registry_models.versions import RECIPE_TAG, VersionReference, ensure_experiment

_log = logging.getLogger(__name__)

#: Experiment of the runs that hold attached recipes.
RECIPES_EXPERIMENT = "gradaudit-recipes"


def log_model(
    model: nn.Module,
    name: str,
    *,
    recipe: Recipe | None = None,
    factory: str | Callable[..., nn.Module] | None = None,
    factory_args: Mapping[str, Any] | None = None,
    **mlflow_options: Any,
) -> ModelInfo:
    """Log and register ``model`` as a new version of ``name``.

    Args:
        model: the trained module; wrappers are looked through.
        name: registered model's name, and the logged model's.
        recipe: how it is trained, from `Recipe.capture`; it travels with the version.
        factory: function (or ``"package.module:function"``) that builds the module. Weights then travel as
            safetensors and loading needs no pickle; without it the module is pickled and its class must be importable
            where audits run.
        factory_args: keyword arguments of the factory, plain values.
        mlflow_options: passed on to `mlflow.pytorch.log_model`.

    Returns:
        MLflow's `ModelInfo`; ``registered_model_version`` is the new version's number.

    Raises:
        RecipeError: a loss or step that cannot be stored.
        ArtifactError: the factory does not rebuild this model.
    """
    model = unwrap(model)
    with tempfile.TemporaryDirectory(prefix="gradaudit-log-") as temporary:
        folder = Path(temporary) / FOLDER
        if recipe is not None:
            write_recipe(recipe, Path(temporary))
        if factory is not None:
            reference = CallableReference.of(factory, role="factory")
            if reference.path is None or not reference.storable:
                raise ArtifactError(
                    f"factory {reference.describe()} cannot be imported by another process: move it to a module"
                )
            write_factory(model, Factory(reference.path, dict(factory_args or {})), folder)
        elif factory_args is not None:
            raise ArtifactError("factory_args= needs factory=")
        else:
            _log.warning("%s is pickled: its class must be importable where audits run; factory= avoids pickle", name)
        extra = list(mlflow_options.pop("extra_files", None) or [])
        if folder.exists():
            extra.append(str(folder))
        options = {
            "name": re.sub(r"[/:.%\"']", "-", name),
            "registered_model_name": name,
            "serialization_format": "pt2" if mlflow_options.get("export_model") else "pickle",
            "pip_requirements": [f"torch=={_torch_version()}"],
            **mlflow_options,
        }
        return mlflow.pytorch.log_model(model, extra_files=extra or None, **options)


def attach_recipe(version: str, recipe: Recipe, *, client: MlflowClient | None = None) -> str:
    """Give an already registered version a recipe: stored in a run of its own, named by the tag ``audit.recipe``.

    Args:
        version: ``models:/NAME/VERSION`` or ``models:/NAME@ALIAS``.
        recipe: from `Recipe.capture`.
        client: MLflow client; the default one otherwise.

    Returns:
        The recipe's URI, ``runs:/RUN/audit``.
    """
    client = client or MlflowClient()
    found = VersionReference.parse(version).resolve(client)
    with tempfile.TemporaryDirectory(prefix="gradaudit-attach-") as temporary:
        folder = write_recipe(recipe, Path(temporary))
        run = client.create_run(
            ensure_experiment(client, RECIPES_EXPERIMENT), run_name=f"recipe for {found.name} v{found.version}"
        )
        client.log_artifacts(run.info.run_id, str(folder), FOLDER)
        client.set_terminated(run.info.run_id)
    uri = f"runs:/{run.info.run_id}/{FOLDER}"
    client.set_model_version_tag(found.name, str(found.version), RECIPE_TAG, uri)
    return uri


def _torch_version() -> str:
    import torch

    return torch.__version__.partition("+")[0]
