"""Elements treated alike: one tensor is the same numbers in pieces, whatever the shape and the size.

Layer-wise and matrix rules (LAMB, Adafactor, Muon) depend on the whole tensor, and nearly every element of theirs
changes when it is cut. In an elementwise rule none does. Where most elements do not change and some do, those are a
special case: a first row, a tail, what lies beyond a capacity.
"""

from __future__ import annotations

import torch

from audits.updates.relations.bench import Bench, Group, Leaf, Run, leaf
from audits.updates.relations.layout import Layout
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


def pieces(bench: Bench, layout: Layout, shapes: list[tuple[int, ...]], seed: int, *, drew: bool) -> Relation:
    """Cut tensors in two places, and lay them flat.

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
    kinds = {len(s) for s in shapes}
    own = sorted({s for s in shapes if 1 < _count(s) <= LARGEST}, key=_count, reverse=True)[:MODEL_SHAPES]
    chosen = list(dict.fromkeys([*own, *(s for s in SIZES if len(s) in kinds)]))
    options = layout.groups[0].options
    whole = {f"{tuple(s)}": leaf(s, generator, STEPS) for s in chosen}
    if not whole:
        return does_not_apply(PIECES, "it holds no tensor that can be cut")
    base = bench.run((Group(options, tuple(whole)),), whole, steps=STEPS)
    cut = _cut(whole)
    in_pieces = bench.run((Group(options, tuple(cut)),), cut, steps=STEPS)
    shares = {n: _agreeing(bench, base, in_pieces, n) for n in whole if whole[n].start.shape[0] > 1}
    if sum(s > MAJORITY for s in shares.values()) * 2 <= len(shares):
        return does_not_apply(PIECES, "its steps depend on whole tensors")
    for name, share in shares.items():
        if share < 1.0:
            where = _where(bench, base, in_pieces, name)
            return broken(PIECES, f"of a tensor of shape {name}, {where} moved otherwise than in pieces")
    if kinds == {1}:
        return holds(PIECES)
    flat = {n: v.reshaped(v.start.numel()) for n, v in whole.items()}
    if 1 not in kinds:
        return holds(PIECES)
    laid = bench.run((Group(options, tuple(flat)),), flat, steps=STEPS)
    for name in whole:
        if _agreeing(bench, base, laid, name) < 1.0:
            return broken(PIECES, f"a tensor of shape {name} is stepped by another rule than the same numbers in one "
                          "dimension")  # fmt: skip
    return holds(PIECES)


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _cut(whole: dict[str, Leaf]) -> dict[str, Leaf]:
    found: dict[str, Leaf] = {}
    for name, one in whole.items():
        rows = one.start.shape[0]
        places = sorted({0, rows // 3, rows // 2 + 1 if rows > 3 else rows, rows})
        for begin, end in zip(places[:-1], places[1:], strict=True):
            found[f"{name}:{begin}"] = one.rows(begin, end)
    return found


def _joined(run: Run, name: str, step: int) -> torch.Tensor:
    parts = [(int(n.rpartition(":")[2]), p) for n, p in run.path[step].items() if n.rpartition(":")[0] == name]
    if not parts:
        return run.path[step][name].reshape(-1)
    return torch.cat([p for _, p in sorted(parts, key=lambda pair: pair[0])]).reshape(-1)


def _agree(bench: Bench, one: Run, other: Run, name: str) -> torch.Tensor:
    """Return which elements went the same way, flat."""
    same: torch.Tensor | None = None
    relative, spacing = tolerance(bench.dtype), 4.0 * torch.finfo(bench.dtype).eps
    for step in range(1, STEPS + 1):
        a, b = one.path[step][name].reshape(-1), _joined(other, name, step)
        went = (a - one.path[step - 1][name].reshape(-1)).abs()
        close = (a - b).abs() <= relative * went.clamp(min=went.mean()) + spacing * a.abs()
        close |= a.isnan() & b.isnan()
        same = close if same is None else same & close
    assert same is not None
    return same


def _agreeing(bench: Bench, one: Run, other: Run, name: str) -> float:
    return float(_agree(bench, one, other, name).to(torch.float64).mean())


def _where(bench: Bench, one: Run, other: Run, name: str) -> str:
    apart = (~_agree(bench, one, other, name)).nonzero().reshape(-1)
    count = one.path[0][name].numel()
    first, last = int(apart[0]), int(apart[-1])
    contiguous = last - first + 1 == len(apart)
    which = f"elements {first} to {last} (flat)" if contiguous else f"{len(apart)} elements, {first} the first of them,"
    return f"{which} of {count}"
