"""Branch rules of operators that pick elements: maxima, order statistics, pooling, norms, scatter-reductions."""

from __future__ import annotations

import math
from typing import Any

import torch

from audits.lanes.kinks.rule import Bound, Rule, register

Tensor = torch.Tensor


def _gather(indices: Tensor, a: Bound) -> tuple[Tensor, Tensor]:
    x, dim = a["self"], a.get("dim", -1)
    if x.dim() == 0:
        return x.clone(), indices.clone()
    if indices.dim() == x.dim():
        return x.gather(dim, indices), indices.clone()
    return x.gather(dim, indices.unsqueeze(dim)).squeeze(dim), indices.clone()


register(
    "topk", "sort", "kthvalue", "mode", "cummax", "cummin",
    rule=Rule(lambda a, out: out[1].clone(), _gather, tie="the index that is returned"),
)  # fmt: skip


def _whole(a: Bound) -> bool:
    return a.get("dim") is None


def _mask(a: Bound, out: Tensor) -> Tensor:
    result: Tensor = (a["self"] == out) | (a["self"].isnan() & out.isnan())
    return result


def _mean_over(mask: Tensor, x: Tensor, dim: Any, keepdim: bool) -> Tensor:
    dims = list(range(x.dim())) if dim is None or dim == [] or dim == () else dim
    if x.dim() == 0:
        return x.clone()
    picked = torch.where(mask, x, 0.0).sum(dims, keepdim=keepdim)
    return picked / mask.sum(dims, keepdim=keepdim)


def _decide_pick(a: Bound, out: Any) -> Tensor:
    return out[1].clone() if isinstance(out, (tuple, list)) else _mask(a, out)


def _replay_pick(decision: Tensor, a: Bound) -> Any:
    if _whole(a):
        return _mean_over(decision, a["self"], None, False)
    return _gather(decision, a)


register(
    "max", "min", "median", "nanmedian",
    rule=Rule(_decide_pick, _replay_pick, tie="over all: split evenly; over a dim: the index that is returned"),
)  # fmt: skip


def _decide_extreme(a: Bound, out: Tensor) -> Tensor:
    dim = a.get("dim")
    if a.get("keepdim") or not dim:
        return _mask(a, out)
    for d in sorted(d % a["self"].dim() for d in dim) if a["self"].dim() else ():
        out = out.unsqueeze(d)
    return _mask(a, out)


register("amax", "amin", rule=Rule(
    _decide_extreme, lambda mask, a: _mean_over(mask, a["self"], a["dim"], a["keepdim"]), tie="split evenly"
))  # fmt: skip


def _aminmax_masks(a: Bound, out: Any) -> tuple[Tensor, Tensor]:
    dim = [] if a["dim"] is None else [a["dim"]]
    one = {**a, "dim": dim}
    return _decide_extreme(one, out[0]), _decide_extreme(one, out[1])


register("aminmax", rule=Rule(
    _aminmax_masks,
    lambda masks, a: tuple(
        _mean_over(m, a["self"], None if a["dim"] is None else [a["dim"]], a["keepdim"]) for m in masks
    ),
    tie="split evenly",
))  # fmt: skip


def _pool(dims: int) -> Rule:
    def replay(indices: Tensor, a: Bound) -> tuple[Tensor, Tensor]:
        flat = a["self"].flatten(-dims)
        return flat.gather(-1, indices.flatten(-dims)).view(indices.shape), indices.clone()

    return Rule(lambda a, out: out[1].clone(), replay, tie="the index that is returned")


register("max_pool2d_with_indices", "adaptive_max_pool2d", "fractional_max_pool2d", rule=_pool(2))
register("max_pool3d_with_indices", "adaptive_max_pool3d", "fractional_max_pool3d", rule=_pool(3))


def _norm_of(a: Bound) -> float:
    return float(a["ord"]) if not isinstance(a["ord"], str) else math.nan


def _decide_norm(a: Bound, out: Tensor) -> tuple[Tensor, Tensor | None]:
    x, order = a["self"], _norm_of(a)
    sign = x.sgn()
    if order in (math.inf, -math.inf):
        return sign, _decide_extreme({"self": x.abs(), "dim": a["dim"], "keepdim": a["keepdim"]}, out)
    return (out.clone() if order == 0 else sign), None


def _replay_norm(decision: tuple[Tensor, Tensor | None], a: Bound) -> Tensor:
    sign, mask = decision
    if _norm_of(a) == 0:
        return sign.clone()
    values = a["self"] * sign
    if mask is not None:
        return _mean_over(mask, values, a["dim"], a["keepdim"])
    result: Tensor = values.sum() if a["dim"] is None else values.sum(a["dim"], keepdim=a["keepdim"])
    return result


register("linalg_vector_norm", rule=Rule(
    _decide_norm, _replay_norm,
    applies=lambda a: a["self"].is_floating_point() and _norm_of(a) in (0.0, 1.0, math.inf, -math.inf),
    tie="1: 0 at 0; inf: split evenly; 0: constant",
))  # fmt: skip


def _segments(a: Bound) -> tuple[Tensor, Tensor, bool]:
    """Index expanded to the source, source cut to the index, whether self takes part."""
    dim, index = a["dim"], a["index"]
    source: Tensor = a["src"] if "src" in a else a["source"]
    if index.dim() < source.dim():  # index_reduce: one index per slice
        shape = [1] * source.dim()
        shape[dim] = -1
        index = index.view(shape).expand_as(source)
    return index, source[tuple(slice(0, n) for n in index.shape)], bool(a["include_self"])


def _decide_scatter(a: Bound, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dim = a["dim"]
    index, source, include_self = _segments(a)
    hit = torch.zeros_like(out, dtype=torch.bool).scatter(dim, index, True)
    from_self = (a["self"] == out) & (~hit if not include_self else torch.ones_like(hit))
    from_source = source == out.gather(dim, index)
    count = from_self.to(out.dtype).scatter_add(dim, index, from_source.to(out.dtype))
    return from_self, from_source, count


def _replay_scatter(decision: tuple[Tensor, Tensor, Tensor], a: Bound) -> Tensor:
    from_self, from_source, count = decision
    index, source, _ = _segments(a)
    total = torch.where(from_self, a["self"], 0.0).scatter_add(a["dim"], index, torch.where(from_source, source, 0.0))
    return total / count


register("scatter_reduce", "index_reduce", rule=Rule(
    _decide_scatter, _replay_scatter,
    applies=lambda a: a["self"].is_floating_point() and a["reduce"] in ("amax", "amin"),
    tie="split evenly",
))  # fmt: skip


def _norms(a: Bound) -> Tensor:
    others = [d for d in range(a["self"].dim()) if d != a["dim"] % a["self"].dim()]
    result: Tensor = torch.linalg.vector_norm(a["self"], float(a["p"]), others, keepdim=True)
    return result


# torch scales rows longer than maxnorm by maxnorm / (norm + 1e-7)
register("renorm", rule=Rule(
    lambda a, out: _norms(a) > a["maxnorm"],
    lambda longer, a: torch.where(longer, a["self"] * (a["maxnorm"] / (_norms(a) + 1e-7)), a["self"]),
    tie="1 at maxnorm",
))  # fmt: skip


def _segment_lengths(a: Bound) -> Tensor:
    lengths = a["lengths"] if a["lengths"] is not None else a["offsets"].diff(dim=-1)
    return torch.repeat_interleave(torch.arange(lengths.shape[-1], device=lengths.device), lengths)


def _decide_segment(a: Bound, out: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    owner = _segment_lengths(a)
    mask = a["data"] == out.index_select(0, owner)
    count = torch.zeros_like(out).index_add(0, owner, mask.to(out.dtype))
    return owner, mask, count, out.clone()


def _replay_segment(d: tuple[Tensor, Tensor, Tensor, Tensor], a: Bound) -> Tensor:
    owner, mask, count, at = d
    total = torch.zeros_like(at).index_add(0, owner, torch.where(mask, a["data"], 0.0))
    return torch.where(count > 0, total / count.clamp_min(1), at)


register("segment_reduce", rule=Rule(
    _decide_segment, _replay_segment,
    applies=lambda a: a["data"].is_floating_point()
    and a["reduce"] in ("max", "min")
    and a["axis"] == 0
    and a["initial"] is None
    and (a["lengths"] if a["lengths"] is not None else a["offsets"]).dim() == 1,
    tie="split evenly",
))  # fmt: skip
