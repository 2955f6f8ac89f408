"""Optimizers that declare a state coarser than the weights, by their name or by an option: 8 bits, bfloat16."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from typing import Any

import torch

from audits.recipe.constructing import optimizer_class
from audits.recipe.phases import OptimizerRecipe

#: Words in an option's or a class's name that declare coarse state.
DECLARES = ("dtype", "bf16", "8bit", "4bit", "fp8", "fp16", "int8", "quant", "precision", "bits")

#: What packages put around the name of the rule whose state they keep so: PagedAdamW8bit, AdamWFp8, FlashAdamW.
_AROUND = re.compile(r"paged|flash|cpu|offload(ed)?|bnb|lowbit|low(er)?precision|quantized|blockwise|"
                     r"(8|4)bit|(b?f|fp|int)(16|8|4)|bfloat16|state")  # fmt: skip


def declares(recipe: OptimizerRecipe, options: Iterable[str] = (), attributes: Iterable[Any] = ()) -> bool:
    """Whether a class's name, an argument, an option or a dtype among its values says that its state is coarse.

    Args:
        recipe: the optimizer.
        options: names of its groups' options.
        attributes: values of its attributes.
    """
    cls = optimizer_class(recipe)
    arguments = inspect.signature(cls.__init__).parameters
    words = [cls.__name__, *options, *recipe.defaults, *arguments]
    if any(word in str(name).lower() for name in words for word in DECLARES):
        return True
    dtypes = [v for v in (*recipe.defaults.values(), *attributes) if isinstance(v, torch.dtype)]
    return any(not d.is_floating_point or torch.finfo(d).eps > torch.finfo(torch.float32).eps for d in dtypes)


def bare_name(name: str) -> str:
    """Return a class's plain name without the words that tell how its state is kept: ``adamw`` of PagedAdamW8bit."""
    return _AROUND.sub("", name.replace("_", "").lower())
