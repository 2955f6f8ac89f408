"""A digest of each part that a verdict depends on, so that what differs between two audits has a name."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from audits.errors import GradauditError
from audits.recipe.attributes import imports_in
from audits.recipe.callables import CallableReference
from audits.recipe.plain_form import recipe_to_plain
from audits.recipe.recipe import Recipe
from audits.short_digests import short_digest, shortened

#: What of a recipe is its loss and its optimizer; everything else but batch, state and step are options.
_LOSS, _OPTIMIZER = ("loss",), ("optimizer", "scheduler")


def recipe_digest(recipe: Recipe) -> str:
    """Return a digest of everything in the recipe, tensors included; a lambda counts by its name only."""
    hasher = hashlib.sha256()
    feed(hasher, recipe_to_plain(recipe, storable=False))
    feed(hasher, recipe.batch)
    for phase in recipe.phases:
        feed(hasher, phase.optimizer.state)
    return shortened(hasher)


def parts_of(model: nn.Module, recipe: Recipe) -> dict[str, str]:
    """Return part -> short digest.

    Args:
        model: the live model.
        recipe: how it is trained.

    Returns:
        ``sources`` (classes of the model's modules and the files that define them, torch's own left out), and of the
        recipe ``loss``, ``optimizer``, ``state``, ``batch``, ``step`` and ``options``. What a registered version's
        files say (``weights``, ``files``) is added by who has the files.
    """
    plain = recipe_to_plain(recipe, storable=False)
    phases = plain.pop("phases")
    frozen = [record["name"] for record in plain.pop("parameters") if not record["trainable"]]
    step = plain.pop("step")
    rest = [{k: v for k, v in phase.items() if k not in (*_LOSS, *_OPTIMIZER)} for phase in phases]
    return {
        "sources": _digest(_sources(model)),
        "loss": _digest([[phase["name"], phase["loss"]] for phase in phases], *_functions(recipe)),
        "optimizer": _digest(
            [[phase["name"], *(phase[key] for key in _OPTIMIZER)] for phase in phases],
            *(_source_of(reference) for reference in recipe.optimizer_rules),
        ),
        "state": _digest([phase.optimizer.state for phase in recipe.phases]),
        "batch": _digest(recipe.batch),
        "step": _digest(step, "" if recipe.step is None else _source_of(recipe.step)),
        "options": _digest(plain, rest, frozen),
    }


def _sources(model: nn.Module) -> list[str]:
    """Class and defining file's digest of every kind of module in the model, in order of first use."""
    found: dict[type, None] = dict.fromkeys(type(module) for module in model.modules())
    return [
        f"{kind.__module__}.{kind.__qualname__} {'' if _is_torchs(kind) else _file_digest_of(kind)}" for kind in found
    ]


def _functions(recipe: Recipe) -> list[str]:
    return [_source_of(phase.loss) for phase in recipe.phases]


def _source_of(reference: CallableReference) -> str:
    """Digest of the file that defines a loss or step function; empty for torch's own and for what has no file."""
    held = [_source_of(CallableReference(path)) for path in imports_in(reference.arguments)]
    try:
        target = reference.resolve()
    except GradauditError:
        return ""
    if held:  # a step or loss that is built around classes of the user's own
        return _digest(*held)
    target = type(target) if isinstance(target, nn.Module) else inspect.unwrap(target) if callable(target) else None
    return "" if target is None or _is_torchs(target) else _file_digest_of(target)


def _is_torchs(thing: Any) -> bool:
    return str(getattr(thing, "__module__", None) or "").partition(".")[0] in ("torch", "builtins", "_functools")


def _file_digest_of(thing: Any) -> str:
    try:
        path = inspect.getsourcefile(thing)
    except TypeError:  # built in, or made at run time
        return ""
    return _file_digest(path) if path else ""


@lru_cache(maxsize=256)
def _file_digest(path: str) -> str:
    try:
        return short_digest(Path(path).read_bytes())
    except OSError:  # a notebook cell
        return ""


def _digest(*values: Any) -> str:
    hasher = hashlib.sha256()
    feed(hasher, values)
    return shortened(hasher)


def feed(hasher: Any, value: Any) -> None:
    """Feed a nested value of tensors, mappings, lists and plain values to a hash."""
    if isinstance(value, torch.Tensor) and value.layout is not torch.strided:  # momentum of sparse gradients
        found = value.detach().to_sparse_coo().coalesce()
        feed(hasher, [list(found.shape), found.indices(), found.values()])
    elif isinstance(value, torch.Tensor):
        tensor = value.detach().cpu().contiguous()
        mark = "requires_grad" if value.requires_grad else ""  # a batch's marks decide what gradient.input may fail
        hasher.update(f"{tensor.dtype}{tuple(tensor.shape)}{mark}".encode())
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            hasher.update(f"{key}:".encode())
            feed(hasher, value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            feed(hasher, item)
            hasher.update(b",")
    else:
        hasher.update(json.dumps(value, default=str).encode())
