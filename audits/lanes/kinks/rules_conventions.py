"""Operators whose gradient torch documents to be something else than the derivative: replayed so that it is one.

An embedding's padding row has no gradient, `scale_grad_by_freq` divides each row's by how often it occurs, fake
quantisation passes the gradient straight through inside its range. The replay holds exactly that constant, or scales
exactly that, and nothing besides: the other rows, and everything around the operator, are judged as ever.
"""

from __future__ import annotations

from typing import Any

import torch

from audits.lanes.kinks.rule import Bound, Rule, register

Tensor = torch.Tensor

#: `torch.nn.EmbeddingBag`'s mode "max" by torch's number.
_MAX = 2


def _uses_padding(a: Bound) -> bool:
    padding = a["padding_idx"]
    return padding is not None and padding >= 0 and bool((a["indices"] == padding).any())


def _counted(a: Bound) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows used, their values, and the factors of their gradients: one over the counts."""
    rows, counts = torch.unique(a["indices"], return_counts=True)
    return rows, a["weight"].detach()[rows], 1 / counts.to(a["weight"].dtype).unsqueeze(1)


def _bag_factors(a: Bound, out: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same for a bag, as its backward has them.

    torch's kernel for the CPU (2.13) divides a row's gradient by another row's count (pytorch issue 190063): the i-th
    row used, in ascending order, by that of the i-th smallest index.
    """
    rows = torch.unique(a["indices"])
    weight, (_, offset2bag, bag_size, largest) = a["weight"], out
    ones = weight.new_ones(out[0].shape[0], 1)
    plain, scaled = (
        torch.ops.aten._embedding_bag_backward(
            ones, a["indices"], a["offsets"], offset2bag, bag_size, largest, weight.shape[0], by_frequency, 0, False,
            None, a["padding_idx"],
        )[rows]
        for by_frequency in (False, True)
    )  # fmt: skip
    return rows, weight.detach()[rows], torch.where(plain > 0, scaled / plain.clamp_min(1), 1)


def _thinned(weight: Tensor, counted: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return the weight with each row's displacement times its factor."""
    rows, at, factors = counted
    thinned = weight.clone()
    thinned[rows] = at + (weight[rows] - at) * factors
    return thinned


def _decide_embedding(a: Bound, out: Tensor) -> tuple[Any, Any]:
    padding = a["weight"].detach()[a["padding_idx"]].clone() if _uses_padding(a) else None
    return padding, _counted(a) if a["scale_grad_by_freq"] else None


def _replay_embedding(decision: tuple[Any, Any], a: Bound) -> Tensor:
    padding, counted = decision
    weight = a["weight"] if counted is None else _thinned(a["weight"], counted)
    rows = torch.embedding(weight, a["indices"])
    if padding is None:
        return rows
    return torch.where((a["indices"] == a["padding_idx"]).unsqueeze(-1), padding, rows)


def _about_embedding(a: Bound, _: Any) -> tuple[Tensor, str]:
    said = [f"row {a['padding_idx']} is the padding row and gets no gradient (padding_idx)"] if _uses_padding(a) else []
    said += [_BY_FREQUENCY] if a["scale_grad_by_freq"] else []
    return a["weight"], " and ".join(said)


_BY_FREQUENCY = "each row's gradient is divided by how often the row occurs in the batch (scale_grad_by_freq)"

register("embedding", rule=Rule(
    _decide_embedding, _replay_embedding,
    applies=lambda a: a["weight"].is_floating_point() and (a["scale_grad_by_freq"] or _uses_padding(a)),
    tie="not a tie: the padding row is held constant, displacements are divided by the row's count",
    convention=_about_embedding,
))  # fmt: skip


def _decide_bag(a: Bound, out: Any) -> Any:
    return tuple(t.clone() for t in out[1:]), _bag_factors(a, out) if a["scale_grad_by_freq"] else None


def _replay_bag(decision: Any, a: Bound) -> Any:
    rest, counted = decision
    if a["mode"] == _MAX:
        picked = rest[2]  # max_indices[bag, d]: which row of the weight gave the maximum; -1 for an empty bag
        values = a["weight"].gather(0, picked.clamp_min(0))
        return (torch.where(picked >= 0, values, 0.0), *(t.clone() for t in rest))
    weight = _thinned(a["weight"], counted)
    return torch._embedding_bag(
        weight, a["indices"], a["offsets"], False, a["mode"], False, a["per_sample_weights"],
        a["include_last_offset"], a["padding_idx"],
    )  # fmt: skip


def _about_bag(a: Bound, decision: Any) -> tuple[Tensor, str] | None:
    if not a["scale_grad_by_freq"]:
        return None
    _, _, factors = decision[1]
    _, _, documented = _counted(a)
    as_documented = torch.allclose(factors, documented)
    return a["weight"], _BY_FREQUENCY if as_documented else f"{_BY_FREQUENCY}; {_OTHER_COUNT}"


_OTHER_COUNT = (
    "this torch's kernel takes another row's count for some rows (pytorch issue 190063): Embedding(scale_grad_by_freq) "
    "followed by a sum takes the row's own"
)

register("_embedding_bag", rule=Rule(
    _decide_bag, _replay_bag,
    applies=lambda a: (a["mode"] == _MAX or a["scale_grad_by_freq"]) and a["weight"].is_floating_point(),
    tie="the index that is returned",
    convention=_about_bag,
))  # fmt: skip

#: Log probabilities come from a float32 `log_softmax` at the coarsest (autocast runs it, and `ctc_loss`, in float32):
#: their sum is 1 to within the rounding of the values, at most half an ulp each, and of the log of their sum.
_NORMALISED = 8 * torch.finfo(torch.float32).eps


def _normalised(a: Bound) -> bool:
    values = a["log_probs"]
    if not values.is_floating_point() or not values.numel():
        return False
    off = values.detach().double().logsumexp(-1).abs()
    return bool((off <= _NORMALISED * (1 + values.detach().double().abs().amax(-1))).all())


def _replay_ctc(level: Tensor, a: Bound) -> Any:
    values = a["log_probs"]
    return torch._ctc_loss(
        values - (values.logsumexp(-1, keepdim=True) - level), a["targets"], a["input_lengths"], a["target_lengths"],
        a["blank"], a["zero_infinity"],
    )  # fmt: skip


# ctc_loss's backward gives the derivative by the logits that log probabilities are the log_softmax of (Graves 2006,
# eq. 16): the derivative by the log probabilities themselves along every change that leaves them normalised. What is
# not normalised, logits that were handed over as they are, is held to the plain derivative and fails.
register("_ctc_loss", rule=Rule(
    lambda a, _: a["log_probs"].detach().logsumexp(-1, keepdim=True), _replay_ctc, applies=_normalised,
    tie="not a tie: log probabilities stay normalised",
))  # fmt: skip
