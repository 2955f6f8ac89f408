"""Tensors of a model on a device whose storage the model's own tensors cannot take."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def takes_storage_of(model: nn.Module, device: torch.device) -> bool:
    """Whether every parameter and buffer of the model can be given storage on the device and stay the same object.

    torch allows it between the CPU and its own accelerators; a device that a library brought along (a PrivateUse1
    backend, such as an NPU's) has tensors of another kind, and `nn.Module.to` makes new parameters there.
    """
    sample = torch.empty(0, device=device)
    tensors = (*model.parameters(), *model.buffers())
    return all(torch._has_compatible_shallow_copy_type(tensor, sample) for tensor in tensors)


@contextlib.contextmanager
def others_in_place(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put copies on the device in the place of all parameters and buffers, and the model's own back on leaving."""
    copies: dict[int, torch.Tensor] = {}

    def copy_of(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in copies:
            moved = tensor.detach().clone().to(device)
            made = nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved
            if tensor.is_leaf and tensor.requires_grad:  # a buffer may, too
                made.requires_grad_()
            vars(made).update(vars(tensor))
            for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
                if getattr(tensor, hooks) is not None:
                    setattr(made, hooks, getattr(tensor, hooks))
            copies[id(tensor)] = made
        return copies[id(tensor)]

    own: list[tuple[dict[str, Any], str, torch.Tensor]] = [
        (table, name, tensor)
        for module in model.modules()
        for table in (module._parameters, module._buffers)
        for name, tensor in list(table.items())
        if tensor is not None
    ]
    try:
        for table, name, tensor in own:
            table[name] = copy_of(tensor)
        _refresh(model)
        yield
    finally:
        for table, name, tensor in own:
            table[name] = tensor
        _refresh(model)


def _refresh(model: nn.Module) -> None:
    """Have recurrent layers look their weights up again: they keep a list of their own."""
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()
