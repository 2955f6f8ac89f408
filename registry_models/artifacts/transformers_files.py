"""The ``transformers`` artifact kind: what `mlflow.transformers.log_model` wrote, read without MLflow."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from audits.errors import ArtifactError, RecipeError
from registry_models.artifacts.mlmodel import read_mlmodel

#: Where MLflow puts the pipeline's model and its other parts.
MODEL_FOLDER, COMPONENTS_FOLDER = "model", "components"

#: Nothing is ever fetched: what is not in the version is not there.
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def load_transformers(folder: Path) -> nn.Module:
    """Return the pipeline's model, every weight from the version's own files.

    Raises:
        ArtifactError: weights are missing, or the class is not in the installed transformers.
    """
    flavor = transformers_flavor(folder)
    path = folder / str(flavor.get("model_binary") or MODEL_FOLDER)
    if flavor.get("peft_adaptor"):
        raise ArtifactError(
            "the version holds a PEFT adapter without its base model: log the merged model "
            "(model.merge_and_unload()), or the eager one with registry_models.log_model(..., factory=...)"
        )
    if not (path / "config.json").is_file():
        raise ArtifactError(
            "the version holds no weights, only a reference to a model hub: log it with save_pretrained=True, or "
            "run mlflow.transformers.persist_pretrained_model on it"
        )
    name = str(flavor.get("pipeline_model_type") or "")
    model_class = getattr(import_transformers(), name, None)
    if model_class is None or not hasattr(model_class, "from_pretrained"):
        raise ArtifactError(
            f"the installed transformers has no model class {name!r}: install the version the model was logged "
            "with, or log the eager model with factory=..."
        )
    dtype = getattr(torch, str(flavor.get("torch_dtype") or "").removeprefix("torch."), None)
    options = {"dtype": dtype} if isinstance(dtype, torch.dtype) else {}
    try:
        model, info = model_class.from_pretrained(
            str(path), local_files_only=True, output_loading_info=True, trust_remote_code=False, **options
        )
    except Exception as error:
        text = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise ArtifactError(
            f"{name} cannot be loaded from the version ({type(error).__name__}: {text}): its files are truncated or "
            "corrupt, or were written by another transformers"
        ) from error
    missing = sorted(map(str, info.get("missing_keys") or [])) + [str(m) for m in info.get("mismatched_keys") or []]
    if missing:
        raise ArtifactError(f"the version's files lack weights of {name}: {', '.join(missing[:5])}")
    return model  # type: ignore[no-any-return]


def build(architecture: str, config: Mapping[str, Any], attention: str | None = None) -> nn.Module:
    """Build a model from its class's name and configuration: the factory of versions that the callback registers.

    Raises:
        ArtifactError: the installed transformers has no such class.
    """
    model_class = getattr(import_transformers(), architecture, None)
    if model_class is None:
        raise ArtifactError(f"the installed transformers has no class {architecture!r}")
    made = model_class.config_class.from_dict(dict(config))
    if attention is not None:
        made._attn_implementation = attention
    return model_class(made)  # type: ignore[no-any-return]


def transformers_flavor(folder: Path) -> Mapping[str, Any]:
    """Return MLflow's description of a logged transformers pipeline."""
    try:
        flavor = (read_mlmodel(folder) or {})["flavors"]["transformers"]
    except (RecipeError, KeyError, TypeError) as error:
        raise ArtifactError(f"MLmodel describes no transformers model: {error}") from error
    if not isinstance(flavor, Mapping):
        raise ArtifactError("MLmodel's transformers flavor is damaged")
    return flavor


def import_transformers() -> Any:
    """Import transformers, offline.

    Raises:
        ArtifactError: it is not installed.
    """
    os.environ.update(_OFFLINE)
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ArtifactError(
            "the version is a transformers model and transformers is not installed where audits run: "
            "pip install 'gradaudit[transformers]'"
        ) from error
