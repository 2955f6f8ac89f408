"""Branch rules of losses with corners: Huber, smooth L1, margins, the clamp inside binary cross-entropy."""

from __future__ import annotations

from typing import Any

import torch

from audits.lanes.kinks.rule import Bound, Rule, register

Tensor = torch.Tensor

#: `torch.nn.Reduction`: 0 none, 1 mean, 2 sum.
_MEAN, _SUM = 1, 2


def _reduce(values: Tensor, a: Bound) -> Tensor:
    if a["reduction"] == _MEAN:
        return values.mean()
    return values.sum() if a["reduction"] == _SUM else values


def _zone(a: Bound, width: float, *, inclusive: bool) -> tuple[Tensor, Tensor]:
    difference = a["self"] - a["target"]
    inside = difference.abs() <= width if inclusive else difference.abs() < width
    return inside, difference.sgn()


def _huber(decision: tuple[Tensor, Tensor], a: Bound) -> Tensor:
    inside, sign = decision
    difference, delta = a["self"] - a["target"], a["delta"]
    return _reduce(torch.where(inside, difference**2 / 2, delta * (difference * sign - delta / 2)), a)


def _smooth_l1(decision: tuple[Tensor, Tensor], a: Bound) -> Tensor:
    inside, sign = decision
    difference, beta = a["self"] - a["target"], a["beta"]
    outside = difference * sign - beta / 2
    return _reduce(torch.where(inside, difference**2 / (2 * beta), outside) if beta else outside, a)


register("huber_loss", rule=Rule(
    lambda a, out: _zone(a, a["delta"], inclusive=True), _huber, tie="the same from both sides"
))  # fmt: skip
register("smooth_l1_loss", rule=Rule(
    lambda a, out: _zone(a, a["beta"], inclusive=False), _smooth_l1, tie="the same from both sides"
))  # fmt: skip


def _margins(a: Bound) -> tuple[Tensor, Tensor]:
    """Return ``margin - x[target] + x[j]`` and a mask of the terms that count (all but the target's own)."""
    x, target = a["self"], a["target"]
    if x.dim() < 2:
        x, target = x.reshape(1, -1), target.reshape(1)
    own = x.gather(1, target.unsqueeze(1))
    terms = a["margin"] - own + x
    return terms, torch.ones_like(x, dtype=torch.bool).scatter(1, target.unsqueeze(1), False)


def _decide_margin(a: Bound, out: Any) -> Tensor:
    terms, counts = _margins(a)
    return (terms > 0) & counts


def _multi_margin(active: Tensor, a: Bound) -> Tensor:
    terms, _ = _margins(a)
    terms = torch.where(active, terms, 0.0) ** int(a["p"])
    target = a["target"].reshape(-1)
    if a["weight"] is not None:
        terms = terms * a["weight"][target].unsqueeze(1)
    per_sample = terms.sum(1) / terms.shape[1]
    return _reduce(per_sample if a["self"].dim() > 1 else per_sample.squeeze(0), a)


register("multi_margin_loss", rule=Rule(_decide_margin, _multi_margin, tie="0 at the margin"))


def _label_margins(a: Bound) -> tuple[Tensor, Tensor]:
    """Return ``1 - x[label] + x[j]`` of every sample, label and j, and a mask of the terms that count."""
    x, target = torch.atleast_2d(a["self"]), torch.atleast_2d(a["target"])
    valid = (target < 0).cumsum(1) == 0  # labels end at the first -1
    labels = target.clamp_min(0)
    is_label = torch.zeros_like(x).scatter_add(1, labels, valid.to(x.dtype)) > 0
    terms = 1 - x.gather(1, labels).unsqueeze(2) + x.unsqueeze(1)
    return terms, valid.unsqueeze(2) & ~is_label.unsqueeze(1)


def _decide_labels(a: Bound, out: Any) -> tuple[Tensor, Tensor]:
    terms, counts = _label_margins(a)
    return (terms > 0) & counts, out[1].clone()


def _multilabel_margin(decision: tuple[Tensor, Tensor], a: Bound) -> tuple[Tensor, Tensor]:
    active, is_target = decision
    terms, _ = _label_margins(a)
    per_sample = torch.where(active, terms, 0.0).sum((1, 2)) / terms.shape[2]
    return _reduce(per_sample if a["self"].dim() > 1 else per_sample.squeeze(0), a), is_target.clone()


register("multilabel_margin_loss_forward", rule=Rule(_decide_labels, _multilabel_margin, tie="0 at the margin"))

#: torch clamps the logarithms inside binary cross-entropy at -100.
LOG_FLOOR = -100.0


def _decide_entropy(a: Bound, out: Any) -> tuple[Tensor, Tensor]:
    return a["self"].log() < LOG_FLOOR, (-a["self"]).log1p() < LOG_FLOOR


def _binary_cross_entropy(decision: tuple[Tensor, Tensor], a: Bound) -> Tensor:
    low, high = decision
    p, target = a["self"], a["target"]
    log_p = torch.where(low, LOG_FLOOR, torch.log(torch.where(low, 0.5, p)))
    log_q = torch.where(high, LOG_FLOOR, torch.log1p(-torch.where(high, 0.5, p)))
    values = (target - 1) * log_q - target * log_p
    if a["weight"] is not None:
        values = values * a["weight"]
    return _reduce(values, a)


register("binary_cross_entropy", rule=Rule(
    _decide_entropy, _binary_cross_entropy, tie="the clamp's side"
))  # fmt: skip
