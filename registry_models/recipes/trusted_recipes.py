"""Files of the trusted recipe repository: some fields of a recipe, laid over what else is known of a version.

```yaml
models: ["char-*"]                        # which registered models; the only field that must be there
loss: "charlm.training:next_token_loss"
optimizer:
  class: torch.optim.AdamW
  options: {lr: 3.0e-4, betas: [0.9, 0.95]}
  groups:                                 # optional; a parameter belongs to the first group whose globs match
    - {parameters: ["*.bias", "*norm*"], options: {weight_decay: 0.0}}
    - {parameters: ["*"], options: {weight_decay: 0.1}}
clip_grad_norm: 1.0
expect: {optimizer: AdamW, frozen: ["backbone.*"]}
```
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from audits.errors import RecipeError
from audits.globs import matching
from audits.recipe.callables import CallableReference, import_object
from audits.recipe.keys import check_keys
from audits.recipe.moulds import Kept
from audits.recipe.phases import OptimizerRecipe, ParameterGroup
from audits.recipe.recipe import Recipe
from registry_models.recipes.plain_yaml import load_yaml

#: Fields of the whole step, and of its one phase.
_WHOLE = ("step", "precision", "normalize", "mode", "seed", "expect", "stop_gradient")
_PHASE = ("loss", "optimizer", "clip_grad_norm", "accumulate")
_OPTIMIZER = ("class", "options", "groups")
_GROUP = ("parameters", "options")


def read_trusted(path: Path) -> dict[str, Any]:
    """Read a file of the repository.

    Raises:
        RecipeError: an unknown key; the text names it and the nearest known one.
    """
    plain = load_yaml(path)
    check_keys(plain, path.name, ("models", *_WHOLE, *_PHASE))
    return {key: value for key, value in plain.items() if key != "models"}


def declared_loss(plain: Mapping[str, Any]) -> CallableReference | None:
    """Return the file's loss, if it gives one."""
    return None if plain.get("loss") is None else _callable(plain["loss"])


def lay_over(recipe: Recipe, plain: Mapping[str, Any], model: nn.Module, label: str) -> Recipe:
    """Return the recipe with the file's fields in the place of its own.

    Raises:
        RecipeError: a field for the one phase of a recipe that has several; a glob that matches no parameter.
    """
    whole: dict[str, Any] = {key: plain[key] for key in _WHOLE if key in plain}
    if whole.get("step") is not None:
        whole["step"] = _callable(whole["step"])
    if "stop_gradient" in whole:
        whole["stop_gradient"] = tuple(whole["stop_gradient"] or ())
    phase_fields: dict[str, Any] = {key: plain[key] for key in _PHASE if key in plain}
    phases = recipe.phases
    if phase_fields:
        if len(phases) != 1:
            names = ", ".join(phase.name for phase in phases)
            raise RecipeError(f"{label} gives {', '.join(phase_fields)} for one phase; the recipe has several: {names}")
        if "loss" in phase_fields:
            phase_fields["loss"] = _callable(phase_fields["loss"])
        if "optimizer" in phase_fields:
            phase_fields["optimizer"] = _optimizer(phase_fields["optimizer"], model, label)
            phase_fields["scheduler"] = None
        phases = (dataclasses.replace(phases[0], **phase_fields),)
    return dataclasses.replace(recipe, phases=phases, assumed=recipe.assumed - set(plain), **whole)


def _callable(value: Any) -> CallableReference:
    if not isinstance(value, str):
        raise RecipeError(f"a loss or step is an import path 'package.module:function' or a known name, not {value!r}")
    return CallableReference(value)


def _optimizer(plain: Any, model: nn.Module, label: str) -> OptimizerRecipe:
    where = f"{label}: optimizer"
    check_keys(plain, where, _OPTIMIZER)
    if not isinstance(plain.get("class"), str):
        raise RecipeError(f"{where} must name its class, such as torch.optim.AdamW")
    path = plain["class"] if any(c in plain["class"] for c in ".:") else f"torch.optim.{plain['class']}"
    options = _options(plain.get("options"))
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups, left = [], dict.fromkeys(trainable)
    for index, group in enumerate(plain.get("groups") or [{"parameters": ["*"]}]):
        check_keys(group, f"{where}.groups[{index}]", _GROUP)
        globs = group.get("parameters") or []
        held = tuple(matching(left, globs))
        if not held:
            raise RecipeError(f"{where}.groups[{index}]: {globs} match no trainable parameter that is left")
        for name in held:
            del left[name]
        groups.append((held, _options(group.get("options"))))
    optimizer_class = import_object(path, role="optimizer class")
    try:
        built = optimizer_class([{"params": [nn.Parameter(torch.zeros(()))], **own} for _, own in groups], **options)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{where}: {path} refuses its options: {error}") from error
    return OptimizerRecipe(
        class_path=path,
        defaults=dict(built.defaults),
        groups=tuple(
            ParameterGroup({k: v for k, v in made.items() if k not in ("params", "param_names")}, held)
            for made, (held, _) in zip(built.param_groups, groups, strict=True)
        ),
        kept=Kept(),  # what its constructor makes of these is what is meant
    )


def _options(plain: Any) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in (plain or {}).items()}
