"""Fifty steps on two convex problems: the loss falls."""

from __future__ import annotations

import torch

from audits.updates.relations.bench import Bench, Group
from audits.updates.relations.bench_loss import Leaf
from audits.updates.relations.layout import Layout
from audits.updates.relations.relation import Relation, broken, does_not_apply, holds

FALLS = "fifty steps on two convex problems lower the loss"

STEPS = 50

#: The configured lr may suit another problem: a rule that goes down does so at one of these multiples of it.
RATES = (1.0, 1e-2, 1e2)


def falls(bench: Bench, layout: Layout) -> Relation:
    """Go down a round bowl and a long valley; with ``maximize`` go up.

    A loss that rises at every rate on both is ascent, which no optimizer's user wants: it fails.
    """
    results = [_lowers(bench, layout, condition) for condition in (1.0, 100.0)]
    if all(r is None for r in results):
        return does_not_apply(FALLS, "it does not take fifty steps")
    where = "at its lr, a hundredth of it or a hundred times it"
    if all(r is not False for r in results):
        return holds(FALLS)
    if any(results):
        return broken(FALLS, f"on one of them the loss does not fall, {where}")
    return broken(FALLS, f"on neither of them the loss falls, {where}", contract=True)


def _lowers(bench: Bench, layout: Layout, condition: float) -> bool | None:
    """Whether the loss falls at one of the rates; None where no run ended."""
    names = tuple(n for g in layout.groups for n in g.names[::2])
    leaves = {n: _bowl(layout.leaves[n], condition) for n in names}
    ended = False
    for rate in RATES:
        groups = []
        for group in layout.groups:
            options = dict(group.options)
            if isinstance(options.get("lr"), float):
                options["lr"] *= rate
            groups.append(Group(options, tuple(n for n in group.names if n in leaves)))
        up = bool(layout.groups[0].options.get("maximize"))
        rates = {"lr": groups[0].options["lr"]} if "lr" in groups[0].options else None
        try:
            run = bench.run(tuple(groups), leaves, steps=STEPS, sign=-1.0 if up else 1.0, defaults=rates)
        except Exception:
            continue
        ended = True
        first, last = (sum(_height(run.path[i][n], leaves[n]) for n in names) for i in (0, STEPS))
        if last < first:
            return True
    return False if ended else None


def _bowl(one: Leaf, condition: float) -> Leaf:
    count = one.start.numel()
    curve = torch.logspace(0.0, 1.0, max(count, 1), base=condition, dtype=torch.float64)[:count] / condition
    zero = torch.zeros_like(one.start).expand(STEPS, *one.start.shape)
    return Leaf(one.start, zero, curve.reshape(one.start.shape))


def _height(value: torch.Tensor, one: Leaf) -> float:
    return float((0.5 * one.curve.to(value.device) * value * value).sum())
