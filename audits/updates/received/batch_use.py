"""How the batches that a step gave to its loss differ from the recipe's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from audits.live.subject import Subject
from audits.outcomes import Outcome
from audits.structures import tensors_in
from audits.updates.received.found import BeforeStep
from audits.updates.received.regrouped import row_bytes
from audits.updates.record.calls import Call

if TYPE_CHECKING:
    from audits.updates.steps import TrainingStep


@dataclass(frozen=True)
class Difference:
    """One tensor of the batch that the step's loss got otherwise than the recipe has it.

    Attributes:
        path: its place in the batch.
        kind: ``"rows"`` (fewer of them), ``"order"`` (the same rows in another order) or ``"values"``.
        text: what to tell a person.
    """

    path: str
    kind: str
    text: str


@dataclass(frozen=True)
class BatchUse:
    """What a batch that is not the recipe's makes of the gradient that was computed from it."""

    outcome: Outcome
    text: str


def batch_use(subject: Subject, steps: Sequence[TrainingStep], call: Call) -> BatchUse | None:
    """Judge the batch that the step gave to its loss; None where it is the recipe's, or was not seen.

    A step may make its batch from the recipe's with random numbers (augmentation, masking, mixing): other ones in each
    step. What differs in the same way in every step is no augmentation: the step trains on something else. Rows of one
    tensor that move without those of the others tear inputs from their targets, at random or not.
    """
    passed = _passed(call)
    if passed is None:
        return None
    recipe = [batch for _, batch in subject.micro_batches(call.phase)]
    found = differences(recipe, passed)
    if not found:
        return None
    what = "; ".join(dict.fromkeys(d.text for d in found[:3]))
    if (path := torn(recipe, passed)) is not None:
        return BatchUse(Outcome.FAIL, f"the step moves the rows of {path!r} and leaves those of the others: {what}")
    if all(d.kind == "order" for d in found):
        return BatchUse(Outcome.PASS, f"the step takes the batch's rows in another order: {what}")
    others = [_passed(c) or recipe for s in steps for c in s.of(call.phase) if s.number != call.step]
    if not others:
        return BatchUse(Outcome.INCONCLUSIVE, f"the step gives its loss another batch than the recipe's: {what}")
    if all(not differences(passed, other) for other in others):
        return BatchUse(
            Outcome.FAIL, f"the step gives its loss another batch than the recipe's, the same in every step: {what}; "
            "if that is meant, capture the batch as the loss gets it",
        )  # fmt: skip
    if any(d.kind == "rows" for d in found):
        return BatchUse(
            Outcome.WARN, f"the step trains on a part of the batch, another one in each step: {what}; that is right "
            "for a minibatch of a buffer, and wrong where the whole batch is meant",
        )  # fmt: skip
    return BatchUse(Outcome.PASS, f"the step makes its batch anew from the recipe's in each step: {what}")


def _passed(call: Call) -> tuple[Any, ...] | None:
    return call.note.batches if isinstance(call.note, BeforeStep) else None


def differences(recipe: Sequence[Any], passed: Sequence[Any]) -> list[Difference]:
    """Compare the micro-batches that were passed, in order, with the recipe's."""
    found: list[Difference] = []
    for meant, given in zip(recipe, passed, strict=True):
        known = dict(tensors_in(meant))
        for path, tensor in tensors_in(given):
            if path not in known:
                found.append(Difference(path, "values", f"the recipe's batch has no {path!r}"))
            elif (difference := _compare(path, known[path], tensor)) is not None:
                found.append(difference)
        given_paths = {path for path, _ in tensors_in(given)}
        found += [Difference(p, "values", f"{p!r} is left out") for p in known if p not in given_paths]
    return found


def torn(recipe: Sequence[Any], passed: Sequence[Any]) -> str | None:
    """Return the path of a tensor whose rows moved without those of the others: an input beside another's target."""
    for meant, given in zip(recipe, passed, strict=True):
        before, after = dict(tensors_in(meant)), dict(tensors_in(given))
        moved, kept = {}, []
        for path in before.keys() & after.keys():
            difference = _compare(path, before[path], after[path])
            if difference is None and before[path].dim():
                kept.append(path)
            elif difference is not None and difference.kind == "order":
                moved[path] = _order(before[path], after[path].to(before[path].device))
        explained = (
            all(_follows(before[p], after[p], order) for p in (*moved, *kept)) for order in moved.values() if order
        )
        if moved and not any(explained):
            return next(iter(moved))
    return None


def _follows(meant: torch.Tensor, given: torch.Tensor, order: Sequence[int]) -> bool:
    """Whether a tensor's rows have this order; one of another length has no say."""
    if meant.shape[0] != len(order):
        return True
    return torch.equal(meant[list(order)], given.to(meant.device))


def _compare(path: str, meant: torch.Tensor, given: torch.Tensor) -> Difference | None:
    given = given.to(meant.device)
    if meant.shape == given.shape:
        if torch.equal(meant, given.to(meant.dtype)):
            return None
        order = _order(meant, given)
        if order is not None:
            return Difference(path, "order", f"{path!r} has its rows in another order")
        return Difference(path, "values", f"{path!r} has other values")
    if meant.dim() and given.dim() == meant.dim() and meant.shape[1:] == given.shape[1:]:
        if given.shape[0] < meant.shape[0]:
            return Difference(path, "rows", f"{path!r} has {given.shape[0]} of its {meant.shape[0]} rows")
        return Difference(path, "values", f"{path!r} has {given.shape[0]} rows, the recipe's {meant.shape[0]}")
    return Difference(path, "values", f"{path!r} has the shape {tuple(given.shape)} for {tuple(meant.shape)}")


def _order(meant: torch.Tensor, given: torch.Tensor) -> tuple[int, ...] | None:
    """Return the recipe's row at each place, None where the rows are not the same ones; equal rows keep their order."""
    if meant.dim() == 0 or meant.dtype != given.dtype:
        return None
    places: dict[bytes, list[int]] = {}
    for index, row in enumerate(row_bytes(meant)):
        places.setdefault(row, []).append(index)
    order = []
    for row in row_bytes(given):
        left = places.get(row)
        if not left:
            return None
        order.append(left.pop(0))
    return tuple(order)
