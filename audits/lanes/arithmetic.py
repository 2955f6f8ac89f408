"""Norms and products of tensors that may be far larger than the cache: one pass each, in pieces that fit."""

from __future__ import annotations

from collections.abc import Iterator

import torch

#: Elements of a piece: 512 KiB in float64, so that a chain of operations on it stays in a core's cache; on a GPU, where
#: a launch costs as much as a pass over 32 MiB, 64 times that.
PIECE, PIECE_ON_GPU = 1 << 16, 1 << 22


def pieces(tensor: torch.Tensor) -> Iterator[slice]:
    """Return the slices of a flattened tensor that are worked on at a time."""
    size, count = piece_size(tensor.device), tensor.numel()
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def piece_size(device: torch.device) -> int:
    """Return how many elements a piece has on a device."""
    return PIECE if device.type == "cpu" else PIECE_ON_GPU


def norm(tensor: torch.Tensor | None) -> float:
    """Return the Euclidean norm, 0 for no tensor."""
    return 0.0 if tensor is None or not tensor.numel() else float(torch.linalg.vector_norm(tensor.double()))
