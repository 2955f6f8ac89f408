"""How nested values of tensors are fed to a hash."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch


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
