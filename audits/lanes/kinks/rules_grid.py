"""Branch rules of grid sampling: which cell a position lies in, which side of the padding's fold."""

from __future__ import annotations

from typing import Any

import torch

from audits.lanes.kinks.rule import Bound, Rule, register

Tensor = torch.Tensor


def _cells(a: Bound) -> Any:
    return a["interpolation_mode"] in (0, 1) and a["input"].is_floating_point()


def _coordinates(a: Bound) -> list[tuple[Tensor, int]]:
    """Return the sampling positions in pixels per axis (x first), with the axis's size; padding not yet applied."""
    grid, sizes = a["grid"], a["input"].shape[:1:-1]
    if a["align_corners"]:
        return [((grid[..., k] + 1) / 2 * (n - 1), n) for k, n in enumerate(sizes)]
    return [(((grid[..., k] + 1) * n - 1) / 2, n) for k, n in enumerate(sizes)]


def _padded_slope(position: Tensor, size: int, a: Bound) -> tuple[Tensor, Tensor]:
    """Return slope and intercept of the padding's piecewise-affine map at each position."""
    slope, offset = torch.ones_like(position), torch.zeros_like(position)
    if a["padding_mode"] == 2:
        low, span = (0.0, size - 1.0) if a["align_corners"] else (-0.5, float(size))
        if span <= 0:
            return torch.zeros_like(position), torch.zeros_like(position)
        side = torch.where(position - low < 0, -1.0, 1.0)
        distance = (position - low) * side
        flips = torch.floor(distance / span)
        odd = (flips % 2) == 1
        slope = torch.where(odd, -side, side)
        shift = torch.where(odd, low + span * (flips + 1), low - span * flips)
        offset = shift - side * low * torch.where(odd, -1.0, 1.0)
    if a["padding_mode"] in (1, 2):
        value = slope * position + offset
        # torch: slope 0 on the border itself
        low_side, high_side = value <= 0, value >= size - 1
        outside = low_side | high_side
        slope = torch.where(outside, 0.0, slope)
        offset = torch.where(low_side, 0.0, torch.where(high_side, size - 1.0, offset))
    return slope, offset


def _decide_grid(a: Bound, out: Tensor) -> Any:
    decision = []
    for position, size in _coordinates(a):
        slope, offset = _padded_slope(position, size, a)
        value = slope * position + offset
        cell = torch.round(value) if a["interpolation_mode"] == 1 else torch.floor(value)
        decision.append((slope, offset, cell))
    return decision


def _replay_grid(decision: Any, a: Bound) -> Tensor:
    """Multilinear interpolation in the cells of theta."""
    image, axes = a["input"], _coordinates(a)
    nearest = a["interpolation_mode"] == 1
    flat, batch, channels = image.flatten(2), image.shape[0], image.shape[1]
    out: Tensor | None = None
    for corner in range(1 if nearest else 2 ** len(axes)):
        weight: Tensor | float = 1.0
        inside: Tensor | bool = True
        index: Tensor | int = 0
        stride = 1
        for k, ((position, size), (slope, offset, cell)) in enumerate(zip(axes, decision, strict=True)):
            upper = (corner >> k) & 1
            node = cell + upper
            if not nearest:
                fraction = slope * position + offset - cell
                weight = weight * (fraction if upper else 1 - fraction)
            inside = inside & (node >= 0) & (node <= size - 1)
            index = index + node.clamp(0, size - 1).long() * stride
            stride *= size
        assert isinstance(index, Tensor)
        assert isinstance(inside, Tensor)
        places = index.flatten(1).unsqueeze(1).expand(batch, channels, -1)
        values = flat.gather(2, places).view(batch, channels, *index.shape[1:])
        term = values * torch.where(inside, torch.as_tensor(weight, dtype=image.dtype), 0.0).unsqueeze(1)
        out = term if out is None else out + term
    assert out is not None
    return out


register("grid_sampler_2d", "grid_sampler_3d", rule=Rule(
    _decide_grid, _replay_grid, applies=_cells, tie="the cell that floor gives; 0 on a padded border"
))  # fmt: skip
