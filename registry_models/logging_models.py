"""Register a model so that it can be audited: MLflow's own pytorch flavour, with a recipe and a factory beside it."""

from __future__ import annotations

import contextlib
import logging
import pickle
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlflow.pytorch
from mlflow.models.model import ModelInfo
from mlflow.tracking import MlflowClient
from torch import nn

from audits.errors import ArtifactError, RecipeError, suggest
from audits.recipe.callables import CallableReference
from audits.recipe.capture import unwrap
from audits.recipe.recipe import Recipe
from registry_models.artifacts.exporting import (
    NotExportableError,
    example_for_mlflow,
    in_eval_mode,
    on_cpu,
    pt2_options,
)
from registry_models.artifacts.factory_files import Factory, write_factory
from registry_models.artifacts.flavours import TRAINABLE
from registry_models.artifacts.shipping import copy_code, ship
from registry_models.inference.peft_parts import with_declared_parts
from registry_models.recipes.recipe_files import (
    BATCH_FILE,
    CODE_FOLDER,
    FOLDER,
    RECIPE_FILE,
    STATE_FILE,
    read_recipe,
    write_recipe,
)
from registry_models.registry.versions import RECIPE_TAG, Version, VersionReference, ensure_experiment, registry_errors

_log = logging.getLogger(__name__)

#: How MLflow writes a module.
_FORMATS = ("pickle", "pt2")

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
        factory: function (or ``"package.module:function"``) that builds the module. Loading then needs no pickle:
            the model is written as pt2, whose weights the audit takes, where `torch.export` can export it, and its
            weights as safetensors where not. Without a factory the module is pickled and its class must be importable
            where audits run.
        factory_args: keyword arguments of the factory, plain values.
        mlflow_options: passed on to `mlflow.pytorch.log_model`. An ``input_example`` that MLflow does not store is left
            out, and a line says so; the inputs that the recipe's loss gives the model are the example otherwise. Code
            of the loss, the step, the factory and the optimizer that is not installed is shipped by ``code_paths``,
            besides what is given there. ``metadata`` gets the number of trainable tensors beside what is given.

    Returns:
        MLflow's `ModelInfo`; ``registered_model_version`` is the new version's number.

    Raises:
        RecipeError: a loss or step that cannot be stored.
        ArtifactError: the factory does not rebuild this model, or ``serialization_format`` cannot be had.
    """
    if recipe is not None:
        recipe = recipe.on(model)
    model = unwrap(model)
    if recipe is not None:
        recipe = with_declared_parts(model, recipe)
    if factory is None and factory_args is not None:
        raise ArtifactError("factory_args= needs factory=")
    metadata = mlflow_options.pop("metadata", None) or {}
    code_paths = [str(path) for path in mlflow_options.pop("code_paths", None) or []]
    reference = None if factory is None else CallableReference.of(factory, role="factory")
    shipment = ship(recipe, factory=reference, pickled=model if factory is None else None, given=code_paths)
    code_paths += [str(path) for path in shipment.paths]
    with tempfile.TemporaryDirectory(prefix="gradaudit-log-") as temporary, on_cpu(model) as stored:
        folder = Path(temporary) / FOLDER
        if shipment.recipe is not None:
            write_recipe(shipment.recipe, Path(temporary))
        written = _serialization(model, name, recipe, factory is not None, mlflow_options)
        mlflow_options.pop("export_model", None)
        pickled = written["serialization_format"] == "pickle"
        if reference is not None:
            # proven with the path it has here; stored under the one it has where the version is loaded
            here = Factory(str(reference.path), dict(factory_args or {}))
            write_factory(stored, here, folder, weights_too=pickled, stored_path=str(shipment.factory))
        elif pickled:
            _log.warning("%s is pickled: its class must be importable where audits run; factory= avoids pickle", name)
        extra = [*(mlflow_options.pop("extra_files", None) or []), *([str(folder)] if folder.exists() else [])]
        options = {
            "name": re.sub(r"[/:.%\"']", "-", name),
            "registered_model_name": name,
            "pip_requirements": [f"torch=={_torch_version()}"],
            **mlflow_options,
            "metadata": {TRAINABLE: sum(p.requires_grad for p in model.parameters()), **metadata},
            **written,
            "extra_files": extra or None,
            "code_paths": code_paths or None,
        }
        if pickled:
            with _pickling():
                return mlflow.pytorch.log_model(model, **options)
        with in_eval_mode(stored), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.export warns about its own internals
            return mlflow.pytorch.log_model(stored, **options)


@contextlib.contextmanager
def _pickling() -> Iterator[None]:
    """Say what to do about a model that cannot be pickled.

    Raises:
        ArtifactError: it cannot.
    """
    try:
        yield
    except (RuntimeError, TypeError, AttributeError, pickle.PicklingError) as error:
        if "pickle" not in str(error).lower() and "parametrized" not in str(error):
            raise
        raise ArtifactError(
            f"the model cannot be pickled ({error}): give factory=... and an input_example with which torch.export "
            "can export it"
        ) from error


def _serialization(
    model: nn.Module, name: str, recipe: Recipe | None, factory: bool, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return how MLflow is to write the model: as the caller says, else pt2 beside a factory where that works.

    Raises:
        ArtifactError: there is no such format, or the caller asks for pt2 and the model cannot be written so.
    """
    example = options.get("input_example")
    asked = options.get("serialization_format") or ("pt2" if options.get("export_model") else None)
    if asked not in (None, *_FORMATS):
        raise ArtifactError(
            f"serialization_format must be one of {', '.join(_FORMATS)}, not {asked!r}{suggest(asked, _FORMATS)}"
        )
    why = ""
    if asked == "pt2" or (asked is None and factory):
        try:
            with on_cpu(model) as exportable:
                chosen = pt2_options(exportable, recipe, example)
        except NotExportableError as error:
            if asked == "pt2":
                raise ArtifactError(
                    f"{name} cannot be written as pt2: {error}; leave serialization_format out"
                ) from None
            why = f"{error}"
        else:
            if isinstance(chosen["input_example"], tuple):
                _log.warning("%s is logged without an input example: MLflow stores no example of several tensors", name)
            return chosen if options.get("signature") is None else {**chosen, "signature": options["signature"]}
    stored = None if example is None else example_for_mlflow(example)
    if example is not None and stored is None:
        _log.warning("%s is logged without an input example: MLflow stores no example of this kind", name)
    elif why and example is None:
        _log.warning("%s is logged without an input example, and not as pt2: %s", name, why)
    return {"serialization_format": asked or "pickle", "input_example": stored}


def attach_recipe(version: str, recipe: Recipe, *, client: MlflowClient | None = None) -> str:
    """Give an already registered version a recipe: stored in a run of its own, named by the tag ``audit.recipe``.

    Anybody may set a tag, so what lowers scrutiny in such a recipe (``stop_gradient``, frozen parameters) is named in
    the report and counts as not covered; a recipe that travels with the version, or a trusted one, has no such limit.

    Args:
        version: ``models:/NAME/VERSION`` or ``models:/NAME@ALIAS``.
        recipe: from `Recipe.capture`.
        client: MLflow client; the default one otherwise.

    Returns:
        The recipe's URI, ``runs:/RUN/audit``.
    """
    client = client or MlflowClient()
    found = VersionReference.parse(version).resolve(client)
    shipment = ship(recipe)
    assert shipment.recipe is not None
    with tempfile.TemporaryDirectory(prefix="gradaudit-attach-") as temporary:
        folder = write_recipe(shipment.recipe, Path(temporary))
        copy_code(shipment.paths, folder / CODE_FOLDER)
        return _upload(folder, found, client)


def attach_recipe_folder(version: str, folder: Path, *, client: MlflowClient | None = None) -> str:
    """Give an already registered version the recipe in ``folder``, as `attach_recipe` does.

    Args:
        version: ``models:/NAME/VERSION`` or ``models:/NAME@ALIAS``.
        folder: ``recipe.yaml`` with its tensors and, if the loss or the step need it, ``code/``; nothing else of it
            is taken.
        client: MLflow client; the default one otherwise.

    Returns:
        The recipe's URI, ``runs:/RUN/audit``.

    Raises:
        RecipeError: the folder holds no usable recipe; the text names what is wrong.
        ArtifactError: there is no such version.
        InfrastructureError: the registry does not answer.
    """
    client = client or MlflowClient()
    found = VersionReference.parse(version).resolve(client)
    read_recipe(folder)
    with tempfile.TemporaryDirectory(prefix="gradaudit-attach-") as temporary:
        copy = Path(temporary) / FOLDER
        copy.mkdir()
        for name in (RECIPE_FILE, BATCH_FILE, STATE_FILE):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, copy / name)
        if (folder / CODE_FOLDER).is_dir():
            if any(path.is_symlink() for path in (folder / CODE_FOLDER).rglob("*")):
                raise RecipeError(f"{CODE_FOLDER}/ holds a symbolic link, which would not lead anywhere: copy the file")
            shutil.copytree(folder / CODE_FOLDER, copy / CODE_FOLDER, ignore=shutil.ignore_patterns("__pycache__"))
        with registry_errors(f"the recipe for {version}"):
            return _upload(copy, found, client)


def _upload(folder: Path, version: Version, client: MlflowClient) -> str:
    run = client.create_run(ensure_experiment(client, RECIPES_EXPERIMENT), run_name=f"recipe for {version.label}")
    client.log_artifacts(run.info.run_id, str(folder), FOLDER)
    client.set_terminated(run.info.run_id)
    uri = f"runs:/{run.info.run_id}/{FOLDER}"
    client.set_model_version_tag(version.name, str(version.version), RECIPE_TAG, uri)
    return uri


def _torch_version() -> str:
    import torch

    return torch.__version__.partition("+")[0]
