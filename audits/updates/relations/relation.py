"""What became of one relation, and how two runs are compared."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

import torch

from audits.updates.compare import FOREIGN_TOLERANCE, rms
from audits.updates.relations.bench import Path, Run


class Held(StrEnum):
    """Whether a relation holds."""

    YES = "holds"
    NO = "broken"
    OPEN = "not applicable"


@dataclass(frozen=True)
class Relation:
    """One relation: what it says, whether it holds, and what was seen.

    Attributes:
        claim: the relation, as a person says it.
        held: whether it holds.
        seen: what was seen, where it is broken or does not apply.
        contract: whether it is part of what every torch optimizer promises: a broken one fails.
    """

    claim: str
    held: Held
    seen: str = ""
    contract: bool = False


def holds(claim: str, seen: str = "", *, contract: bool = False) -> Relation:
    """Return a relation that holds."""
    return Relation(claim, Held.YES, seen, contract)


def broken(claim: str, seen: str, *, contract: bool = False) -> Relation:
    """Return a relation that is broken."""
    return Relation(claim, Held.NO, seen, contract)


def does_not_apply(claim: str, seen: str) -> Relation:
    """Return a relation that says nothing about this optimizer."""
    return Relation(claim, Held.OPEN, seen)


def tolerance(dtype: torch.dtype) -> float:
    """Return the relative difference, of the way a tensor went, that two orders of one arithmetic may make.

    ``sqrt(eps)``: a few steps of sums and products lose far fewer than half of the digits. Code that is
    not torch's may compute its scalars in float32.
    """
    return max(float(torch.finfo(dtype).eps ** 0.5), FOREIGN_TOLERANCE)


def arithmetic_of(run: Run, dtype: torch.dtype) -> torch.dtype:
    """Return the coarsest dtype that a watched run computed in: its sums are no finer."""
    known = [d for d in {dtype, *run.dtypes} if d in (torch.float64, torch.float32, torch.bfloat16, torch.float16)]
    return max(known, key=lambda d: torch.finfo(d).eps)


def first_apart(
    one: Path, other: Path, names: Iterable[str], dtype: torch.dtype, arithmetic: torch.dtype | None = None
) -> tuple[str, int, float] | None:  # fmt: skip
    """Return (tensor, step, relative difference) where two ways part, or None.

    The difference is relative to how far the tensor went; what is a number in one way only parts.

    Args:
        one: a way.
        other: another.
        names: the tensors to compare.
        dtype: of the weights, whose own spacing is no difference.
        arithmetic: of the optimizer, where it is coarser.
    """
    relative, spacing = tolerance(arithmetic or dtype), 4.0 * torch.finfo(dtype).eps
    names = list(names)
    for step, (a, b) in enumerate(zip(one, other, strict=True)):
        for name in names:
            if torch.equal(a[name], b[name]):
                continue
            if not bool((a[name].isfinite() == b[name].isfinite()).all()):
                return name, step, float("inf")
            if not bool(a[name].isfinite().all()):
                continue
            size = max(length(one, name, step), length(other, name, step))
            off = rms(a[name] - b[name])
            if off > relative * size + spacing * rms(a[name]):
                return name, step, off / size if size else float("inf")
    return None


def length(path: Path, name: str, steps: int) -> float:
    """Return the rms of the largest step that a tensor took among the first ones."""
    return max((rms(path[i][name] - path[i - 1][name]) for i in range(1, steps + 1)), default=0.0)


def moved(path: Path, name: str, since: int = 0) -> bool:
    """Whether a tensor left where it was at a step."""
    return any(not torch.equal(path[since][name], point[name]) for point in path[since + 1 :])
