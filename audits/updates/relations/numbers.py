"""Precision and kernels: float32 as float64, state as fine as the weights, foreach and fused as the plain loop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from audits.updates.compare import rms
from audits.updates.relations.bench import Bench, Group, Run
from audits.updates.relations.bench_loss import Leaf
from audits.updates.relations.layout import Layout
from audits.updates.relations.relation import (
    Relation,
    arithmetic_of,
    broken,
    does_not_apply,
    first_apart,
    holds,
    tolerance,
)
from audits.updates.rules.coarse_names import declares

FLOAT32 = "float32 weights go as float64 weights do, but for rounding"
STATE = "the state is kept as finely as the weights"
KERNELS = "foreach and fused go as the plain loop"

#: Independent draws of float32's rounding, in float64; four times the scatter of one bounds another's.
DRAWS = 2
FACTOR = 4.0

#: Roundings of float32 between a gradient and its step: a hundred operations.
ROUNDINGS = 100.0

#: Share of a tensor's elements whose difference is compared: a sign that flips on a tie is one element's.
SHARE = 0.75


def precision(bench: Bench, layout: Layout, base: Run) -> Iterator[Relation]:
    """Run in float32, and in float64 from numbers that are off by float32's rounding."""
    single = bench.using(dtype=torch.float32)
    try:
        run = single.run(layout.groups, layout.leaves)
    except Exception as error:
        seen = f"float32 weights raise {type(error).__name__}: {' '.join(str(error).split())[:120]}"
        yield broken(FLOAT32, seen)
        return
    yield _state(bench, run, layout)
    if bench.dtype is not torch.float64:
        yield does_not_apply(FLOAT32, "it does not run in float64")
        return
    if base.drew:
        yield does_not_apply(FLOAT32, "it draws random numbers, others in each dtype")
        return
    inside = arithmetic_of(base, bench.dtype)
    coarse = inside is not torch.float64  # then each lane rounds inside by itself, as Newton-Schulz in bfloat16
    eps = float(torch.finfo(torch.float32).eps)
    relative = tolerance(max(inside, torch.float32, key=lambda d: torch.finfo(d).eps)) if coarse else ROUNDINGS * eps
    noisy = [bench.run(layout.groups, _rounded(layout, draw)) for draw in range(DRAWS)]
    for name in layout.names:
        for step in range(1, len(base.path)):
            went = rms(base.path[step][name] - base.path[0][name])
            off = _typical(run, base, name, step)
            explained = max(_typical(other, base, name, step) for other in noisy)
            weights = eps * step * rms(base.path[step][name])
            if off > relative * went + FACTOR * explained + FACTOR * weights:
                seen = f"at step {step} float32 weights are {off / went:.1%} of their way elsewhere" if went else (
                    f"at step {step} float32 weights moved and float64 ones did not")  # fmt: skip
                yield broken(FLOAT32, f"{seen}, which float32's rounding does not explain")
                return
    yield holds(FLOAT32, f"it computes in {inside} inside" if coarse else "")


def _typical(one: Run, other: Run, name: str, step: int) -> float:
    off = (one.path[step][name] - other.path[step][name]).abs().reshape(-1)
    return float(torch.quantile(off.nan_to_num(), SHARE)) if off.numel() else 0.0


def _rounded(layout: Layout, draw: int) -> dict[str, Leaf]:
    generator = torch.Generator().manual_seed(draw)
    eps = float(torch.finfo(torch.float32).eps)

    def off(value: torch.Tensor) -> torch.Tensor:
        return value * (1.0 + eps * torch.randn(value.shape, dtype=value.dtype, generator=generator))

    return {n: Leaf(off(v.start), off(v.pull), off(v.curve)) for n, v in layout.leaves.items()}


def _state(bench: Bench, run: Run, layout: Layout) -> Relation:
    if declares(bench.recipe, layout.groups[0].options, vars(run.optimizer).values()):
        return does_not_apply(STATE, "its name or an option declares the state's precision")
    for state in run.optimizer.state.values():
        for key, value in state.items() if isinstance(state, dict) else ():
            if not isinstance(value, torch.Tensor) or value.numel() <= 1 or not value.is_floating_point():
                continue
            if torch.finfo(value.dtype).eps > torch.finfo(torch.float32).eps:
                return broken(STATE, f"its {key} is {value.dtype} for float32 weights")
            if value.dtype is torch.float32 and _coarse(value):
                return broken(STATE, f"its {key} holds float32 numbers of bfloat16's precision")
    return holds(STATE)


def _coarse(value: torch.Tensor) -> bool:
    """Whether no number uses more than bfloat16's digits, though their sizes differ as computed ones do."""
    some = value[value != 0]
    many = some.numel() > 4 and some.abs().unique().numel() * 2 > some.numel()
    return many and torch.equal(some.to(torch.bfloat16).to(torch.float32), some)


def kernels(bench: Bench, layout: Layout, base: Run) -> Relation:
    """Choose each implementation that the options offer."""
    offered = [key for key in ("foreach", "fused") if all(key in g.options for g in layout.groups)]
    if not offered:
        return does_not_apply(KERNELS, "it offers no other implementation than one")
    loop = bench.run(_choosing(layout, dict.fromkeys(offered, False)), layout.leaves,
                     defaults=dict.fromkeys(offered, False))  # fmt: skip
    for key in offered:
        chosen: dict[str, Any] = {**dict.fromkeys(offered, False), key: True}
        try:
            run = bench.run(_choosing(layout, chosen), layout.leaves, defaults=chosen)
        except Exception:  # what it does not have on this device
            continue
        if apart := first_apart(loop.path, run.path, layout.names, bench.dtype, arithmetic_of(base, bench.dtype)):
            return broken(KERNELS, f"{key}=True leaves the plain loop at step {apart[1]} by {apart[2]:.2g} of a step")
    return holds(KERNELS)


def _choosing(layout: Layout, chosen: dict[str, Any]) -> tuple[Group, ...]:
    return tuple(Group({**g.options, **chosen}, g.names) for g in layout.groups)
