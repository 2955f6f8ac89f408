"""Options that are read: the learning rate, the decay, what the user set, and ``maximize``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from audits.recipe.constructing import optimizer_class
from audits.updates.relations.bench import Bench, Group, Run
from audits.updates.relations.layout import Layout
from audits.updates.relations.relation import (
    Relation,
    arithmetic_of,
    broken,
    does_not_apply,
    first_apart,
    holds,
    moved,
)

STILL = "with lr 0 nothing moves"
USED = "lr, decay and every option that was set are used"
MAXIMIZE = "maximize is the same rule on negated gradients"

#: Options whose effect a run of `PULLS` must show; of any other that shows none it is only told.
SHOWN = (
    "lr", "weight_decay", "momentum", "nesterov", "amsgrad", "ams_bound", "centered", "maximize", "betas", "dampening",
    "alpha", "rho", "beta", "beta1", "beta2",
)  # fmt: skip

#: Options that choose an implementation: they should change nothing.
IMPLEMENTATION = ("foreach", "fused", "capturable", "differentiable")

#: Steps of these runs: all of `PULLS`, so that what acts after a large gradient, or every few steps, acts.
STEPS = 8


def variant(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return other values, that are valid wherever the own ones are, of the options that every user sets by group."""
    found: dict[str, Any] = {}
    for key in ("lr", "weight_decay", "betas", "momentum", "eps"):
        value = options.get(key)
        if key not in defaults or value is None or isinstance(value, bool):
            continue
        if isinstance(value, float) or (isinstance(value, int) and key in ("lr", "weight_decay")):
            if key == "weight_decay":
                found[key] = 2.0 * value if value else 0.1
            elif value:
                found[key] = {"lr": 0.5, "eps": 10.0}.get(key, 0.5) * value
        elif key == "betas" and isinstance(value, (tuple, list)) and value and isinstance(value[0], float) and value[0]:
            found[key] = type(value)((0.5 * value[0], *value[1:]))
    return found


def still(bench: Bench, layout: Layout) -> Relation:
    """Take steps with a learning rate of 0."""
    if any(not isinstance(g.options.get("lr"), float) for g in layout.groups):
        return does_not_apply(STILL, "it has no learning rate that is a number")
    try:
        run = bench.run(_with(layout, {"lr": 0.0}), layout.leaves, defaults={"lr": 0.0})
    except Exception as error:
        return does_not_apply(STILL, f"it refuses lr 0 ({' '.join(str(error).split())[:120]})")
    if any(moved(run.path, name) for name in layout.names):
        return broken(STILL, "with lr 0, as a warmup begins, weights move")
    return holds(STILL)


def used(bench: Bench, layout: Layout) -> Relation:
    """Change each option that was set back to what it is by default, and lr by half; the way must change."""
    steps = max(STEPS, bench.steps)
    base = bench.run(layout.groups, layout.leaves, steps=steps)
    silent: list[str] = []
    noted: list[str] = []
    for key, other in _changes(bench, layout.groups[0].options).items():
        try:
            run = bench.run(_with(layout, {key: other}), layout.leaves, steps=steps, defaults={key: other})
        except Exception:  # the other value is not valid beside the rest
            continue
        if all((a[n] == b[n]).all() for a, b in zip(base.path, run.path, strict=True) for n in layout.names):
            seen = f"{key}={layout.groups[0].options[key]!r} does nothing: the steps are those of {key}={other!r}"
            (silent if key in SHOWN else noted).append(seen)
    if silent:
        return broken(USED, "; ".join(silent))
    return holds(USED, "; ".join(noted))


def _changes(bench: Bench, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return option -> another value: half the lr, no decay, the constructor's default of what differs from it."""
    arguments = inspect.signature(optimizer_class(bench.recipe).__init__).parameters
    found: dict[str, Any] = {}
    for key, value in options.items():
        if key in IMPLEMENTATION or not isinstance(value, (bool, int, float, tuple, list)):
            continue
        default = arguments[key].default if key in arguments else inspect.Parameter.empty
        if key == "lr" and isinstance(value, (int, float)):
            found[key] = 0.5 * value
        elif key == "weight_decay" and value:
            found[key] = 0.0
        elif default is not inspect.Parameter.empty and default is not None and default != value:
            found[key] = default
    return found


def maximize(bench: Bench, layout: Layout) -> Relation:
    """Step up a loss, and down the negated one."""
    if not all("maximize" in g.options for g in layout.groups):
        return does_not_apply(MAXIMIZE, "it has no option maximize")
    ways: list[Run] = []
    for up in (True, False):
        chosen = _with(layout, {"maximize": up})
        try:
            ways.append(bench.run(chosen, layout.leaves, defaults={"maximize": up}, sign=-1.0 if up else 1.0))
        except Exception as error:
            seen = f"maximize={up} raises {type(error).__name__}: {' '.join(str(error).split())[:120]}"
            return broken(MAXIMIZE, seen)
    arithmetic = arithmetic_of(ways[0], bench.dtype)
    if apart := first_apart(ways[0].path, ways[1].path, layout.names, bench.dtype, arithmetic):
        return broken(MAXIMIZE, f"with maximize, step {apart[1]} is not the step on the negated gradient")
    return holds(MAXIMIZE)


def _with(layout: Layout, options: Mapping[str, Any]) -> tuple[Group, ...]:
    return tuple(
        Group({**g.options, **{k: v for k, v in options.items() if k in g.options}}, g.names) for g in layout.groups
    )
