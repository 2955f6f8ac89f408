"""What every torch optimizer promises: groups, order, tensors without gradients, state that can be saved."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from audits.updates.relations.bench import Bench, Group, Run
from audits.updates.relations.layout import Layout
from audits.updates.relations.options import variant
from audits.updates.relations.relation import (
    Relation,
    arithmetic_of,
    broken,
    does_not_apply,
    first_apart,
    holds,
    moved,
)

REPEATS = "the same start and seed give the same steps"
UNTOUCHED = "a tensor without gradient, or frozen, is left alone"
RESUMES = "saved and loaded, it goes on as if it never stopped"
COPIES = "a copy goes on as the original"
ORDER = "the order of the tensors does not matter"
GROUPS = "each param group is stepped with its own options"


def repeats(bench: Bench, layout: Layout, base: Run) -> Relation:
    """Run the same again, with memory that nobody wrote filled with NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        again = bench.run(layout.groups, layout.leaves)
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill
    other = bench.run(layout.groups, layout.leaves)
    for run, why in ((other, ""), (again, " where unwritten memory holds NaN: it reads memory that it never wrote")):
        if apart := first_apart(base.path, run.path, layout.names, bench.dtype, arithmetic_of(base, bench.dtype)):
            return broken(REPEATS, f"two runs part at step {apart[1]} on the {_kind(apart[0])}{why}", contract=True)
    return holds(REPEATS, contract=True)


def untouched(bench: Bench, layout: Layout) -> Relation:
    """Give tensors no gradient: from the start, from a step on, and frozen ones."""
    told = []
    for group in layout.groups:
        first, last = group.names[0], group.names[-1]
        for what, silent, frozen, since in (
            ("never had a gradient", {first: 0}, (), 0),
            ("has no gradient any more", {last: bench.saved_after}, (), bench.saved_after),
            ("is frozen", {}, (last,), 0),
        ):
            try:
                run = bench.run(layout.groups, layout.leaves, silent=silent, frozen=frozen)
            except Exception as error:
                told.append(f"a tensor that {what} stops the step: {type(error).__name__}: {_short(error)}")
                continue
            name = frozen[0] if frozen else next(iter(silent))
            if moved(run.path, name, since):
                told.append(f"a tensor that {what} was moved")
    if told:
        return broken(UNTOUCHED, "; ".join(dict.fromkeys(told)), contract=True)
    return holds(UNTOUCHED, contract=True)


def resumes(bench: Bench, layout: Layout) -> Iterator[Relation]:
    """Go on in a fresh optimizer that loaded the state, and in a copy."""
    base = bench.run(layout.groups, layout.leaves, watched=True)  # in the model's own dtype, which loading may cast to
    for how, claim in (("state_dict", RESUMES), ("copy", COPIES)):
        try:
            run = bench.run(layout.groups, layout.leaves, resume=how)
        except Exception as error:
            told = f"it raised {type(error).__name__}: {_short(error)}"
            yield broken(claim, told, contract=True) if how == "state_dict" else does_not_apply(claim, told)
            continue
        arithmetic = arithmetic_of(base, bench.dtype)
        if apart := first_apart(base.path, run.path, layout.names, bench.dtype, arithmetic):
            where = "state_dict() and load_state_dict() do not carry" if how == "state_dict" else "a copy does not have"
            told = f"saved after step {bench.saved_after}, step {apart[1]} goes another way: it depends on state that {where}"
            yield broken(claim, told, contract=how == "state_dict")
        else:
            yield holds(claim, contract=how == "state_dict")


def order(bench: Bench, layout: Layout, base: Run) -> Relation:
    """Hand over the tensors of each group in the opposite order."""
    if base.drew:
        return does_not_apply(ORDER, "it draws random numbers, in the order of the tensors")
    turned = tuple(Group(g.options, g.names[::-1]) for g in layout.groups)
    run = bench.run(turned, layout.leaves)
    if apart := first_apart(base.path, run.path, layout.names, bench.dtype, arithmetic_of(base, bench.dtype)):
        told = f"handed over in the opposite order, the {_kind(apart[0])} goes another way at step {apart[1]}, by {apart[2]:.2g} of a step"
        return broken(ORDER, f"{told}: state or scalars of one tensor reach another", contract=True)
    return holds(ORDER, contract=True)


def groups(bench: Bench, layout: Layout, base: Run) -> Relation:
    """Hold two groups in one optimizer against each in an optimizer of its own; the second has other options."""
    if base.drew:
        return does_not_apply(GROUPS, "it draws random numbers, in the order of the tensors")
    own = layout.groups[0]
    kept = own.names[::2], own.names[1::2]  # one twin of each kind, and the other
    alone = tuple(bench.run((Group(own.options, names),), layout.leaves) for names in kept)
    together = bench.run(tuple(Group(own.options, names) for names in kept), layout.leaves)
    arithmetic = arithmetic_of(base, bench.dtype)
    coupled = [
        a for run, names in zip(alone, kept, strict=True)
        if (a := first_apart(run.path, together.path, names, bench.dtype, arithmetic))
    ]  # fmt: skip
    shared = sorted(_estimates(together)) if coupled else []
    told: list[str] = []
    for key, value in variant(own.options, bench.recipe.defaults).items():
        try:
            problem = _ignored(bench, layout, own, kept, key, value, arithmetic, coupled=bool(coupled))
        except Exception as error:
            if key == "lr":
                return does_not_apply(GROUPS, f"it refuses groups of different lr ({_short(error)})")
            continue
        if problem:
            told.append(problem)
    if told and shared:
        return does_not_apply(GROUPS, f"it estimates {' and '.join(shared)} for all groups together; {'; '.join(told)}")
    if told:
        return broken(GROUPS, "; ".join(told), contract=True)
    if coupled:
        told_apart = "a tensor's step depends on the other tensors, as by a norm of all gradients"
        return holds(GROUPS, told_apart, contract=True)
    return holds(GROUPS, contract=True)


def _ignored(
    bench: Bench, layout: Layout, own: Group, kept: tuple[tuple[str, ...], ...], key: str, value: Any,
    arithmetic: torch.dtype, *, coupled: bool,
) -> str:  # fmt: skip
    """Return how the second group's option is ignored, or nothing."""
    first, plain = Group(own.options, kept[0]), Group(own.options, kept[1])
    other = Group({**own.options, key: value}, kept[1])

    def apart(one: Run, two: Run, names: tuple[str, ...]) -> bool:
        return first_apart(one.path, two.path, names, bench.dtype, arithmetic) is not None

    meant = bench.run((other,), layout.leaves, defaults={key: value})
    if not apart(meant, bench.run((plain,), layout.leaves), kept[1]):
        return ""  # an option that changes nothing, even given to the constructor, is another relation's
    both = bench.run((first, other), layout.leaves)
    what = f"{key}={value!r} of the second group"
    if not apart(both, bench.run((first, plain), layout.leaves), kept[1]):
        return f"{what} is ignored: it moves as without it"
    if coupled:  # what it would do alone is not known
        return ""
    if apart(both, meant, kept[1]):
        return f"{what} is not what it is stepped with: in an optimizer of its own with that {key} it goes another way"
    if apart(both, bench.run((first,), layout.leaves), kept[0]):
        return f"{what} changes what the first group does"
    return ""


def _estimates(run: Run) -> set[str]:
    """Return the options that the steps themselves set, alike in all groups: an estimate for all tensors together."""
    groups = run.optimizer.param_groups
    return {
        key
        for key, value in groups[0].items()
        if isinstance(value, (float, torch.Tensor))
        and key not in ("lr", "params")
        and key in run.optimizer.defaults
        and float(value) != run.optimizer.defaults[key]
        and all(float(g.get(key, 0.0)) == float(value) for g in groups)
    }


def _kind(name: str) -> str:
    return name.rpartition(" ")[0].rpartition(", ")[2] + " tensor"


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:160] + ("..." if len(text) > 160 else "")
