"""Branch rules of pairwise distances with kinks: p = 0, 1 and infinity."""

from __future__ import annotations

import math

import torch

from audits.lanes.kinks.rule import Bound, Rule, register

Tensor = torch.Tensor


def _differences(a: Bound) -> Tensor:
    result: Tensor = a["x1"].unsqueeze(-2) - a["x2"].unsqueeze(-3)
    return result


def _is_kinked(p: float) -> bool:
    return p in (0.0, 1.0, math.inf)


def _decide_distance(difference: Tensor, p: float) -> tuple[Tensor, Tensor | None]:
    sign = difference.sgn()
    if p == math.inf:
        size = difference.abs()
        largest = size.amax(-1, keepdim=True)
        mask = size == largest
        # torch gives every tied difference the whole slope: the branch is the sum less what is counted too often
        return torch.where(mask, sign, 0.0), (mask.sum(-1) - 1) * largest.squeeze(-1)
    return sign, None


def _replay_distance(decision: tuple[Tensor, Tensor | None], difference: Tensor, p: float) -> Tensor:
    sign, surplus = decision
    if p == 0:
        return (sign != 0).to(difference.dtype).sum(-1)
    total = (difference * sign).sum(-1)
    return total if surplus is None else total - surplus


register("_cdist_forward", rule=Rule(
    lambda a, out: _decide_distance(_differences(a), float(a["p"])),
    lambda d, a: _replay_distance(d, _differences(a), float(a["p"])),
    applies=lambda a: a["x1"].is_floating_point() and _is_kinked(float(a["p"])),
    tie="1: 0 at 0; inf: the whole slope to each tied difference",
))  # fmt: skip


def _pairs(a: Bound) -> Tensor:
    first, second = torch.triu_indices(a["self"].shape[0], a["self"].shape[0], 1, device=a["self"].device)
    result: Tensor = a["self"][first] - a["self"][second]
    return result


register("_pdist_forward", rule=Rule(
    lambda a, out: _decide_distance(_pairs(a), float(a["p"])),
    lambda d, a: _replay_distance(d, _pairs(a), float(a["p"])),
    applies=lambda a: a["self"].is_floating_point() and _is_kinked(float(a["p"])),
    tie="1: 0 at 0; inf: the whole slope to each tied difference",
))  # fmt: skip
