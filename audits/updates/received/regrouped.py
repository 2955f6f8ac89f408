"""A step that takes the batch's rows in groups, or in an order, of its own: the reference is evaluated on the same.

Random numbers belong to places in a batch, not to rows: a dropout whose rows come shuffled, or a BatchNorm that sees
them part by part, gives another gradient than the declared loss on the batch as the recipe has it, and a right one.
Which rows the model was given is seen at its forwards; every row has to come once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from audits.lanes.separation import weighing_here
from audits.live.subject import LivePhase, Subject
from audits.live.weighing import Weighing, joined
from audits.structures import map_tensors, tensors_in
from audits.updates.received.observed import Draw, Forward, draws_of, forwards_of, matches
from audits.updates.received.reference import Start


@dataclass(frozen=True)
class Groups:
    """The batch's rows as a step took them.

    Attributes:
        batches: the micro-batches that they make.
        text: how they differ from the recipe's, for a sentence.
        weighing: how the declared loss weighs them.
    """

    batches: tuple[Any, ...]
    text: str
    weighing: Weighing


def groups_of(subject: Subject, phase: LivePhase, forwards: Sequence[Forward]) -> Groups | None:
    """Return the groups in which a step's forwards took the batch's rows; None where they are not all taken once.

    Args:
        subject: the model under audit, just before an optimizer's step.
        phase: whose loss.
        forwards: the model's forwards since the optimizer step before.
    """
    own = [batch for _, batch in subject.micro_batches(phase)]
    try:
        whole = own[0] if len(own) == 1 else joined(own)
    except ValueError:
        return None
    counts = {t.shape[0] for _, t in tensors_in(whole) if t.dim()}
    evaluation = forwards_of(subject, phase, own[0])
    if not evaluation or len(forwards) % evaluation or len(counts) != 1:
        return None
    size = counts.pop()
    known = [t for _, t in tensors_in(whole) if t.dim()]
    parts = [forwards[at : at + evaluation] for at in range(0, len(forwards), evaluation)]
    rows = [_rows_of(part, known) for part in parts]
    if any(r is None for r in rows) or sorted(i for r in rows for i in r or ()) != list(range(size)):
        return None
    batches = tuple(_taken(whole, r or (), size) for r in rows)
    if len(batches) == len(own) and all(_same(one, other) for one, other in zip(batches, own, strict=True)):
        return None
    weighing = subject.weighings[phase.name]
    if len(batches) > 1:
        found = weighing_here(subject, phase, list(batches))
        if found is None:
            return None
        weighing = found
    text = f"in {len(batches)} groups of its own" if len(batches) > 1 else "in another order"
    return Groups(batches, f"the step takes the batch's rows {text}", weighing)


def starts_of(
    subject: Subject, phase: LivePhase, groups: Groups, draws: Sequence[Draw], plain: Sequence[Start]
) -> Iterator[Start]:
    """Yield where the losses of the groups may have begun: where the step drew what they draw, else ``plain``."""
    wanted = [draws_of(subject, phase, batch) for batch in groups.batches]
    if all(wanted):
        for places in reversed(list(matches(wanted, draws))):
            yield replace(places[0], pieces=tuple(start.random for start in places), batches=groups.batches)
    elif not any(wanted):
        yield from (replace(start, batches=groups.batches) for start in plain)


def _rows_of(part: Sequence[Forward], known: Sequence[torch.Tensor]) -> tuple[int, ...] | None:
    """Return which rows of the batch the forwards of one evaluation took; None where that cannot be told."""
    found = [order for forward in part for t in forward.tensors for k in known if (order := _places(t, k)) is not None]
    return found[0] if found and all(order == found[0] for order in found) else None


def _places(given: torch.Tensor, known: torch.Tensor) -> tuple[int, ...] | None:
    """Return the place of each row of a tensor among the rows of another; None where they are not its rows.

    Rows that occur twice say nothing, and neither do a few numbers that occur anywhere.
    """
    if not given.dim() or given.dtype != known.dtype or given[:1].numel() != known[:1].numel():
        return None
    places = {row: index for index, row in enumerate(row_bytes(known))}
    if len(places) < len(known):
        return None
    found = [places.get(row) for row in row_bytes(given)]
    return None if not found or None in found else tuple(index for index in found if index is not None)


def row_bytes(tensor: torch.Tensor) -> list[bytes]:
    """Return each row's values, to be compared or counted."""
    plain = tensor.detach().cpu().contiguous()
    return [row.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes() for row in plain]


def _taken(whole: Any, rows: tuple[int, ...], size: int) -> Any:
    return map_tensors(whole, lambda t: t[list(rows)] if t.dim() and t.shape[0] == size else t)


def _same(one: Any, other: Any) -> bool:
    pairs = zip(tensors_in(one), tensors_in(other), strict=True)
    return all(a.shape == b.shape and torch.equal(a, b) for (_, a), (_, b) in pairs)
