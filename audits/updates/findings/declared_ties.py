"""Ties that a model's own configuration declares, as transformers' models do, and that are not one tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from audits.live.subject import Subject
from audits.outcomes import Outcome, ResultRow
from audits.updates.update_rows import row

_CHECK = "registration.tied"


def declared_tie_rows(subject: Subject) -> list[ResultRow]:
    """Return one row per tie that a configuration declares: its two names are one tensor.

    Ties that the recipe records are left to their own row. Of two frozen tensors nothing grows apart: a warning.
    """
    recorded = [set(names) for names in subject.recipe.ties]
    rows = []
    for first, second, one, other, where in _declared(subject.model):
        if any({first, second} <= names for names in recorded):
            continue
        if one is other:
            message = f"{second} = {first}, one tensor, as {where} declares"
            rows.append(row(subject, _CHECK, Outcome.PASS, message, parameter=first))
            continue
        trained = one.requires_grad or other.requires_grad
        message = (f"{second} and {first} are separate tensors, though {where} declares them tied: "
                   f"{'a step moves them apart' if trained else 'both are frozen'}. To do: tie them before the "
                   "optimizer is built (model.tie_weights()), or declare tie_word_embeddings=False")  # fmt: skip
        outcome = Outcome.FAIL if trained else Outcome.WARN
        rows.append(row(subject, _CHECK, outcome, message, parameter=second))
    return rows


def _declared(model: nn.Module) -> Iterator[tuple[str, str, torch.Tensor, torch.Tensor, str]]:
    """Yield (first name, second name, first tensor, second tensor, where it is declared), each pair once."""
    names = dict(model.named_parameters(remove_duplicate=False))
    seen: set[frozenset[str]] = set()
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for source, target, where in _pairs(module):
            first, second = f"{prefix}{source}", f"{prefix}{target}"
            if first in names and second in names and frozenset((first, second)) not in seen:
                seen.add(frozenset((first, second)))
                yield first, second, names[first], names[second], where


def _pairs(module: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Yield (source, target, where it is declared) of one module, in its own names.

    ``_tied_weights_keys`` is a mapping of targets to sources (transformers 5; ``all_tied_weights_keys`` is what is in
    force there), or a list of targets of the input embedding (4). Neither counts where the configuration says
    ``tie_word_embeddings=False``.
    """
    config = getattr(module, "config", None)
    tie = getattr(config, "tie_word_embeddings", None)
    keys: Any = getattr(module, "_tied_weights_keys", None)
    if tie is False or (tie is None and not keys):
        return
    inside = _name_of_weight(module, "get_input_embeddings")
    outside = _name_of_weight(module, "get_output_embeddings")
    if (
        tie and inside and outside and not isinstance(keys, Mapping)
    ):  # a mapping says all of it: LUKE's head is not tied
        yield inside, outside, "config.tie_word_embeddings"
    in_force = getattr(module, "all_tied_weights_keys", None)
    if isinstance(keys, Mapping):
        found = in_force if isinstance(in_force, Mapping) and in_force else keys
        for target, source in found.items():
            yield str(source), str(target), "_tied_weights_keys"
    elif isinstance(keys, (list, tuple, set)) and inside:
        for target in sorted(map(str, keys)):
            if target.endswith("weight") and target != inside:
                yield inside, target, "_tied_weights_keys"


def _name_of_weight(module: nn.Module, getter: str) -> str | None:
    """Return the name of the weight of the layer that a getter of the model's returns; None where there is none."""
    get = getattr(module, getter, None)
    if not callable(get):
        return None
    try:
        layer = get()
    except Exception:  # transformers' base classes raise where a model has no such layer
        return None
    if not isinstance(layer, nn.Module):
        return None
    path = next((name for name, found in module.named_modules() if found is layer), None)
    weight = getattr(layer, "weight", None)
    return f"{path}.weight" if path and isinstance(weight, torch.Tensor) and weight.dim() > 1 else None
