"""A recipe inside a model version: written, found and read. No pickle in any of the files.

```
audit/recipe.yaml             everything but the tensors; human-readable, comments allowed
audit/batch.safetensors       the batch's tensors, under the names that recipe.yaml's ``batch`` gives them
audit/optimizer.safetensors   optimizer state, when there is any; its structure is in the file's metadata; and the
                              tensors among the optimizer's ``attributes``
audit/code/                   modules of the loss and the step, in a recipe that was attached to a version
```
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from audits.errors import RecipeError
from audits.recipe.plain_form import recipe_from_plain, recipe_to_plain
from audits.recipe.recipe import Recipe
from registry_models.recipes.plain_yaml import load_yaml
from registry_models.recipes.recipe_names import BATCH_FILE, CODE_FOLDER, FOLDER, RECIPE_FILE, STATE_FILE

__all__ = [
    "BATCH_FILE",
    "CODE_FOLDER",
    "FOLDER",
    "RECIPE_FILE",
    "STATE_FILE",
    "load_yaml",
    "read_recipe",
    "write_recipe",
]


def write_recipe(recipe: Recipe, folder: Path) -> Path:
    """Write the recipe's files into ``folder/audit`` and return that folder.

    Raises:
        RecipeError: a loss or step function that cannot be stored; the text names the cure.
    """
    plain = recipe_to_plain(recipe)
    _refuse_main(recipe)
    target = folder / FOLDER
    target.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    plain["batch"] = _encode(recipe.batch, "batch", tensors)
    save_file(tensors, target / BATCH_FILE)
    state: dict[str, torch.Tensor] = {}
    for phase, described in zip(recipe.phases, plain["phases"], strict=True):
        optimizer = described["optimizer"]
        if "attributes" in optimizer:
            optimizer["attributes"] = _encode(optimizer["attributes"], f"{phase.name} attributes", state)
    structure = {phase.name: _encode(phase.optimizer.state, phase.name, state) for phase in recipe.phases}
    if state or any(structure.values()):
        save_file(state, target / STATE_FILE, metadata={"structure": json.dumps(structure)})
    header = "# How this model is trained for one step, for gradaudit. Comments are allowed; unknown keys are errors.\n"
    text = yaml.dump(plain, Dumper=_PlainDumper, sort_keys=False, width=120)
    (target / RECIPE_FILE).write_text(header + text, encoding="utf-8")
    return target


def read_recipe(folder: Path) -> Recipe:
    """Read the recipe in ``folder`` (the ``audit`` folder itself).

    Raises:
        RecipeError: a file is missing, broken, or has an unknown or missing key; the text names it.
    """
    plain = load_yaml(folder / RECIPE_FILE)
    if not isinstance(plain, dict):
        raise RecipeError(f"{RECIPE_FILE} must be a mapping")
    if "batch" not in plain:
        raise RecipeError("recipe lacks the key 'batch'")
    batch = _decode(plain.pop("batch"), _read_tensors(folder / BATCH_FILE)[0])
    state: Any = {}
    tensors: dict[str, torch.Tensor] = {}
    if (folder / STATE_FILE).exists():
        tensors, metadata = _read_tensors(folder / STATE_FILE)
        state = _decode(json.loads(metadata.get("structure", "{}")), tensors)
    _decode_attributes(plain.get("phases"), tensors)
    return recipe_from_plain(plain, batch=batch, state=state)


def _decode_attributes(phases: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put the tensors into the attributes of the optimizers; whatever else is wrong there is said by their reader."""
    for phase in phases if isinstance(phases, list) else ():
        optimizer = phase.get("optimizer") if isinstance(phase, Mapping) else None
        if isinstance(optimizer, dict) and "attributes" in optimizer:
            optimizer["attributes"] = _decode(optimizer["attributes"], tensors)


class _PlainDumper(yaml.SafeDumper):
    """A safe dumper that repeats values instead of referring to them."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _refuse_main(recipe: Recipe) -> None:
    for role, reference in [("step", recipe.step), *((f"loss of {p.name!r}", p.loss) for p in recipe.phases)]:
        if reference is not None and (reference.path or "").startswith("__main__:"):
            raise RecipeError(
                f"{role} is defined in the script itself ({reference.path}): no other process can import "
                "it. Cure: move it to a module and pass that module's function"
            )
    for phase in recipe.phases:
        if phase.optimizer.class_path.startswith("__main__:") or "<locals>" in phase.optimizer.class_path:
            raise RecipeError(
                f"the optimizer class {phase.optimizer.class_path} cannot be imported by another process. "
                "Cure: move it to a module"
            )


def _encode(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Replace tensors by ``{"tensor": name}`` and put them into ``tensors``; tuples become ``{"tuple": [...]}``."""
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided:
            raise RecipeError(f"{path} is a {value.layout} tensor; recipes store dense ones: call .to_dense()")
        plain = value.detach().cpu()
        tensors[path] = (torch.view_as_real(plain) if plain.is_complex() else plain).contiguous().clone()
        marks = {"complex": True} if plain.is_complex() else {}
        return {"tensor": path, **marks, **({"requires_grad": True} if value.requires_grad else {})}
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise RecipeError(f"{path} has a key that is not a string: {list(value)}")
        return {key: _encode(item, f"{path}.{key}", tensors) for key, item in value.items()}
    if isinstance(value, tuple):
        return {"tuple": [_encode(item, f"{path}.{i}", tensors) for i, item in enumerate(value)]}
    if isinstance(value, list):
        return [_encode(item, f"{path}.{i}", tensors) for i, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise RecipeError(f"{path} is a {type(value).__name__}; a recipe stores tensors, numbers, strings, dicts and lists")


def _decode(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, Mapping):
        if "tensor" in value and set(value) <= {"tensor", "complex", "requires_grad"}:
            if value["tensor"] not in tensors:
                raise RecipeError(f"the recipe names the tensor {value['tensor']!r}, which its safetensors file lacks")
            tensor = tensors[value["tensor"]]
            tensor = torch.view_as_complex(tensor) if value.get("complex") else tensor
            return tensor.requires_grad_() if value.get("requires_grad") else tensor
        if set(value) == {"tuple"}:
            return tuple(_decode(item, tensors) for item in value["tuple"])
        return {key: _decode(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    return value


def _read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    if not path.is_file():
        raise RecipeError(f"there is no {path.name} beside {RECIPE_FILE}")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise RecipeError(f"{path.name} is truncated or corrupt: {error}") from error
