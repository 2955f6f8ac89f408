"""What a peft configuration declares: the active adapters' own parameters are trained, everything else is frozen."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from audits.recipe.recipe import Recipe

_SAVED, _PROMPT, _TOKENS = ".modules_to_save.", "prompt_encoder.", "trainable_tokens_"


def is_peft(model: nn.Module) -> bool:
    """Whether the model is one of peft's, around another."""
    return any(cls.__name__ == "PeftModel" and cls.__module__.startswith("peft.") for cls in type(model).__mro__)


def inner_model(model: Any) -> Any:
    """Return the model inside peft's; any other model as it is."""
    return model.get_base_model() if is_peft(model) else model


def with_declared_parts(model: nn.Module, recipe: Recipe) -> Recipe:
    """Return the recipe with ``expect["trainable"]`` and ``["frozen"]`` as the adapters' configuration says.

    What the user declared stays as it is.
    """
    if not is_peft(model):
        return recipe
    # DoRA holds the weight's norm constant on purpose (section 4.3 of its paper)
    stopped = [
        n for n, m in model.named_modules() if type(m).__module__.endswith(".dora") and "Dora" in type(m).__name__
    ]
    recipe = dataclasses.replace(recipe, stop_gradient=tuple(dict.fromkeys((*recipe.stop_gradient, *stopped))))
    if {"trainable", "frozen"} & set(recipe.expect):
        return recipe
    trainable, frozen = declared_parts(model)
    return dataclasses.replace(recipe, expect={**recipe.expect, "trainable": trainable, "frozen": frozen})


def declared_parts(model: Any) -> tuple[list[str], list[str]]:
    """Return the names of the parameters that are meant to be trained, and of those that are meant to be frozen.

    Trained are, of the active adapters: their factors, vectors and prompts, copies of ``modules_to_save``, and biases
    where ``bias`` says so; nothing under ``inference_mode``.
    """
    active = list(model.active_adapters) if hasattr(model, "active_adapters") else [model.active_adapter]
    active = [name for name in active if not model.peft_config[name].inference_mode]
    prefix = getattr(model.base_model, "prefix", None)
    biases = {str(getattr(model.peft_config[name], "bias", "none")) for name in active}
    trainable: list[str] = []
    frozen: list[str] = []
    for name, _ in model.named_parameters():
        meant = _of_adapters(name, active, prefix) or _bias(name, biases)
        (trainable if meant else frozen).append(name)
    return trainable, frozen


def _of_adapters(name: str, active: list[str], prefix: str | None) -> bool:
    own = _SAVED in name or name.startswith(_PROMPT) or _TOKENS in name or (prefix is not None and prefix in name)
    return own and any(adapter in name.split(".") for adapter in active)


def _bias(name: str, biases: set[str]) -> bool:
    if not name.endswith("bias") or _SAVED in name:
        return False
    return "all" in biases or ("lora_only" in biases and name.endswith("base_layer.bias"))
