"""The ``eager`` artifact kind: a factory's import path and arguments; weights in safetensors, or in MLflow's pt2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from audits.errors import ArtifactError, RecipeError, unknown_among
from audits.recipe.callables import import_object
from registry_models.artifacts.file_names import FACTORY_FILE, WEIGHTS_FILE
from registry_models.artifacts.pt2_weights import read_pt2_weights
from registry_models.recipes.plain_yaml import load_yaml


@dataclass(frozen=True)
class Factory:
    """What rebuilds the module: ``path(**arguments)``."""

    path: str
    arguments: Mapping[str, Any]

    def build(self) -> nn.Module:
        """Import and call the factory.

        Raises:
            ArtifactError: it cannot be imported, raises, or returns no module.
        """
        try:
            model = import_object(self.path, role="factory")(**self.arguments)
        except RecipeError as error:
            raise ArtifactError(str(error)) from error
        except Exception as error:
            raise ArtifactError(f"factory {self.path!r} raised {type(error).__name__}: {error}") from error
        if not isinstance(model, nn.Module):
            raise ArtifactError(f"factory {self.path!r} returned {type(model).__name__}, not a torch.nn.Module")
        return model


def write_factory(
    model: nn.Module, factory: Factory, folder: Path, *, weights_too: bool = True, stored_path: str | None = None
) -> None:
    """Write the factory and the model's weights, after proving that they give the same model back.

    Args:
        model: the model whose weights they are.
        factory: what rebuilds it.
        folder: where to.
        weights_too: False where a pt2 archive beside it brings the weights.
        stored_path: the factory's import path where the version is loaded, if it is another one there.

    Raises:
        ArtifactError: the factory does not rebuild this model; the text says where they differ.
    """
    weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in _unique_state(model).items()}
    rebuilt = factory.build()
    load_weights(rebuilt, weights)
    folder.mkdir(parents=True, exist_ok=True)
    if weights_too:
        save_file(weights, folder / WEIGHTS_FILE)
    plain = {"factory": stored_path or factory.path, "arguments": dict(factory.arguments)}
    (folder / FACTORY_FILE).write_text(yaml.safe_dump(plain, sort_keys=False), encoding="utf-8")


def read_factory(folder: Path) -> nn.Module:
    """Rebuild the module and load its weights, strictly: from ``folder``, else from the model directory's pt2.

    Raises:
        ArtifactError: a file is broken, the factory fails, or the weights do not fit.
    """
    try:
        plain = load_yaml(folder / FACTORY_FILE)
    except RecipeError as error:
        raise ArtifactError(str(error)) from error
    if not isinstance(plain, dict) or not isinstance(plain.get("factory"), str):
        raise ArtifactError(f"{FACTORY_FILE} must name its 'factory' as 'package.module:function'")
    if unknown := unknown_among(plain, ("factory", "arguments")):
        raise ArtifactError(f"{FACTORY_FILE} has unknown key {unknown}")
    archive = folder.parent.parent / "data" / "model.pt2"
    if archive.is_file() and not (folder / WEIGHTS_FILE).exists():
        weights = read_pt2_weights(archive)
    else:
        try:
            weights = load_file(folder / WEIGHTS_FILE)
        except (SafetensorError, OSError, ValueError) as error:
            raise ArtifactError(f"{WEIGHTS_FILE} is missing, truncated or corrupt: {error}") from error
    model = Factory(plain["factory"], plain.get("arguments") or {}).build()
    load_weights(model, _without_aliases(model, weights))
    return model


def _without_aliases(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Drop later names of tied tensors: an archive brings them under each name, and they must agree."""
    kept = dict(weights)
    for name, first in _aliases(model).items():
        tensor = kept.pop(name, None)
        if tensor is not None and first in kept and not torch.equal(tensor, kept[first]):
            raise ArtifactError(f"the factory ties {name!r} to {first!r}, but their weights differ")
    return kept


def load_weights(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Load weights strictly: every tensor of the model, every tensor of the file, same shapes.

    Raises:
        ArtifactError: names are missing or left over, or shapes differ.
    """
    wanted = _unique_state(model)
    missing, extra = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    if missing or extra:
        parts = [
            f"{label} {', '.join(names[:5])}" for label, names in (("missing", missing), ("left over", extra)) if names
        ]
        raise ArtifactError(f"the weights do not fit the factory's model: {'; '.join(parts)}")
    for name, tensor in wanted.items():
        if tensor.shape != weights[name].shape:
            raise ArtifactError(
                f"the weights do not fit the factory's model: {name!r} has shape "
                f"{tuple(weights[name].shape)}, the model wants {tuple(tensor.shape)}"
            )
    aliases = {n: weights[canonical] for n, canonical in _aliases(model).items()}
    model.load_state_dict({**weights, **aliases}, strict=True)


def _unique_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict with every tied tensor under its first name only."""
    repeated = _aliases(model)
    state = model.state_dict()
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise ArtifactError(f"the state dict's {name!r} is not a tensor: modules with get_extra_state need pickle")
    return {name: tensor for name, tensor in state.items() if name not in repeated}


def _aliases(model: nn.Module) -> dict[str, str]:
    """Later names of tied tensors -> their first name."""
    first: dict[int, str] = {}
    repeated = {}
    live = model.state_dict(keep_vars=True)
    for name, tensor in live.items():
        if id(tensor) in first:
            repeated[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
    return repeated
