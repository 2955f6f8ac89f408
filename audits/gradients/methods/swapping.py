"""Other tensors in the place of a model's parameters while a body runs: each slot once, put back whatever is raised.

`torch.nn.utils.stateless` visits a slot once per *name*: a submodule under two names is swapped twice, the second time
for the copy, and the copy stays in the model. Here the slots are found before the first of them is written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

#: Registry, name in it, the parameter that it holds, and the tensor's name in the model.
Slot = tuple[Any, str, torch.Tensor, str]


def slots_of(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> list[Slot]:
    """Return every slot that holds one of the named tensors, aliases of tied ones included.

    Args:
        model: the module.
        tensors: the parameters now in the model, by name.
    """
    names = {id(tensor): name for name, tensor in tensors.items()}
    found: list[Slot] = []
    for module in model.modules():  # each module object once, however many names it has
        registry: Any = module._parameters
        found += [(registry, key, t, names[id(t)]) for key, t in registry.items() if id(t) in names]
    return found


@contextlib.contextmanager
def swapped(slots: list[Slot], tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Let the slots hold other tensors while the body runs.

    Args:
        slots: what `slots_of` found.
        tensors: what to hold, by the names given there.
    """
    try:
        for registry, key, _, name in slots:
            registry[key] = tensors[name]
        yield
    finally:
        with contextlib.ExitStack() as back:
            for registry, key, original, _ in slots:
                back.callback(registry.__setitem__, key, original)
