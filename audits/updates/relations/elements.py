"""Elements treated alike: one tensor is the same numbers in pieces, whatever the shape and the size.

Layer-wise and matrix rules (LAMB, Adafactor, Muon) depend on the whole tensor, and most elements of theirs go elsewhere
when it is cut. In an elementwise rule none does. Where most elements do not and some do, those are a special case: a
first row, a tail, what lies beyond a capacity. A special case is one for all numbers; what depends on the numbers
themselves (a norm, a cosine) shows elsewhere with others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch

from audits.updates.relations.bench import Bench, Group, Run
from audits.updates.relations.bench_loss import Leaf, leaf
from audits.updates.relations.layout import SHAPES, Layout
from audits.updates.relations.relation import Relation, broken, does_not_apply, holds, tolerance

PIECES = "one tensor is stepped as the same numbers in pieces, at every shape and size"

#: Steps of these runs.
STEPS = 3

#: Shapes beside the model's: several blocks of a vector unit and a tail, long ones, thin and wide ones.
SIZES: tuple[tuple[int, ...], ...] = ((1031,), (17, 24), (3,), (1,), (9001,), (130, 65), (1, 40), (40, 1))

#: Largest tensor of the model's shapes that is run, and how many of them.
LARGEST = 2**15
MODEL_SHAPES = 6

#: Share of elements that must agree for a rule to be elementwise: fewer than half is a rule of whole tensors.
MAJORITY = 0.5

#: Draws in all of which the same elements must part.
DRAWS = 3

#: (shape, how it was cut) -> whether each element went another way, flat.
Parted = dict[tuple[tuple[int, ...], str], torch.Tensor]


def pieces(bench: Bench, layout: Layout, shapes: list[tuple[int, ...]], seed: int, *, drew: bool) -> Relation:
    """Cut tensors along their first and their last dimension, and lay them flat.

    Args:
        bench: the optimizer.
        layout: its groups; the first group's options are used.
        shapes: the model's own shapes of that group.
        seed: of the draws.
        drew: whether the optimizer draws random numbers.
    """
    if drew:
        return does_not_apply(PIECES, "it draws random numbers, in the order of the elements")
    generator = torch.Generator().manual_seed(seed)
    options = layout.groups[0].options
    kinds = {len(s) for s in shapes if len(s) in SHAPES} - {0}
    established = _elementwise(_parted(bench, options, [SHAPES[k] for k in kinds], generator, flat=False))
    if not established:
        return does_not_apply(PIECES, "its steps depend on whole tensors")
    own = sorted({s for s in shapes if 1 < math.prod(s) <= LARGEST}, key=math.prod, reverse=True)[:MODEL_SHAPES]
    chosen = dict.fromkeys([*(SHAPES[k] for k in established), *own, *SIZES])
    kept = [s for s in chosen if len(s) in established]
    seen: list[Parted] = []
    for _ in range(DRAWS):
        found = {k: v for k, v in _parted(bench, options, kept, generator, flat=1 in established).items() if v.any()}
        if not found:
            return holds(PIECES) if not seen else does_not_apply(PIECES, "its steps depend on whole tensors")
        seen.append(found)
    always = {k: v for k, v in seen[0].items() if all(k in s and torch.equal(s[k], v) for s in seen)}
    partly = [k for k, v in always.items() if not v.all()]
    if not partly and any(s.keys() != always.keys() for s in seen):
        return does_not_apply(PIECES, "its steps depend on whole tensors")
    shape, how = min(partly or always, key=lambda k: math.prod(k[0]))
    return broken(PIECES, _described(shape, how, always[shape, how]))


def _elementwise(found: Parted) -> set[int]:
    """Return the numbers of dimensions in which most elements go the same way however they are cut."""
    kinds = {len(shape) for shape, _ in found}
    return {
        k for k in kinds
        if all(1.0 - float(v.to(torch.float64).mean()) > MAJORITY for (s, _), v in found.items() if len(s) == k)
    }  # fmt: skip


def _parted(
    bench: Bench, options: Mapping[str, Any], shapes: list[tuple[int, ...]], generator: torch.Generator, *, flat: bool
) -> Parted:
    whole = {f"{s}": leaf(s, generator, STEPS) for s in shapes}
    base = bench.run((Group(options, tuple(whole)),), whole, steps=STEPS)
    found: Parted = {}
    for how, dimension in (("cut along its first dimension", 0), ("cut along its last dimension", -1), ("flat", None)):
        cut: dict[str, Leaf] = {}
        parts: dict[tuple[int, ...], list[str]] = {}
        for shape in shapes:
            if (dimension != 0 and len(shape) == 1) or (dimension is None and not flat):
                continue
            ranges = _ranges(1 if dimension is None else shape[dimension])
            names = [f"{shape}[{begin}]" for begin, _ in ranges]
            for name, (begin, end) in zip(names, ranges, strict=True):
                one = whole[f"{shape}"]
                cut[name] = one.flat() if dimension is None else one.part(dimension, begin, end)
            parts[shape] = names
        if not cut:
            continue
        run = bench.run((Group(options, tuple(cut)),), cut, steps=STEPS)
        for shape, names in parts.items():
            found[shape, how] = _elsewhere(bench, base, run, shape, names, dimension)
    return found


def _ranges(size: int) -> list[tuple[int, int]]:
    places = sorted({0, size // 3, size // 2 + 1 if size > 3 else size, size})
    return list(itertools.pairwise(places))


def _elsewhere(
    bench: Bench, one: Run, other: Run, shape: tuple[int, ...], names: list[str], dimension: int | None
) -> torch.Tensor:
    relative, spacing = tolerance(bench.dtype), 4.0 * torch.finfo(bench.dtype).eps
    apart = torch.zeros(math.prod(shape), dtype=torch.bool)
    for step in range(1, STEPS + 1):
        a, before = one.path[step][f"{shape}"], one.path[step - 1][f"{shape}"]
        b = torch.cat([other.path[step][n] for n in names], dim=dimension or 0).reshape(shape)
        went = (a - before).abs()
        close = (a - b).abs() <= relative * went.clamp(min=float(went.mean())) + spacing * a.abs()
        apart |= ~(close | (a.isnan() & b.isnan())).reshape(-1).cpu()
    return apart


def _described(shape: tuple[int, ...], how: str, apart: torch.Tensor) -> str:
    places, count = apart.nonzero().reshape(-1), apart.numel()
    first, last = int(places[0]), int(places[-1])
    if len(places) == count:
        which = "every element"
    elif last == first:
        which = f"element {first} of {count}"
    elif last - first + 1 == len(places):
        which = f"elements {first} to {last} of {count}"
    else:
        which = f"{len(places)} elements of {count}, from {first} to {last},"
    return f"in a tensor of shape {shape} {which} moved otherwise than with the same numbers {how}"
