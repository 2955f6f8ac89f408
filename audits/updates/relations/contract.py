"""What every torch optimizer promises: groups, order, tensors without gradients, state that can be saved."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
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
ORDER = "the order of the tensors, and which of them have a gradient, does not matter to the others"
GROUPS = "each param group is stepped with its own options"


def repeats(bench: Bench, layout: Layout, base: Run) -> Relation:
    """Run the same again, with memory that nobody wrote filled with NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filling: Any = torch.utils.deterministic
    fill = filling.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        filling.fill_uninitialized_memory = True
        again = bench.run(layout.groups, layout.leaves)
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        filling.fill_uninitialized_memory = fill
    other = bench.run(layout.groups, layout.leaves)
    for run, why in ((other, ""), (again, " where unwritten memory holds NaN: it reads memory that it never wrote")):
        if apart := first_apart(base.path, run.path, layout.names, bench.dtype, arithmetic_of(base, bench.dtype)):
            return broken(REPEATS, f"two runs part at step {apart[1]} on the {_kind(apart[0])}{why}", contract=True)
    return holds(REPEATS, contract=True)


def untouched(bench: Bench, layout: Layout) -> Relation:
    """Give tensors no gradient: from the start, from a step on, and frozen ones."""
    seen = []
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
                seen.append(f"a tensor that {what} stops the step: {type(error).__name__}: {_short(error)}")
                continue
            name = frozen[0] if frozen else next(iter(silent))
            if moved(run.path, name, since):
                seen.append(f"a tensor that {what} was moved")
    if seen:
        return broken(UNTOUCHED, "; ".join(dict.fromkeys(seen)), contract=True)
    return holds(UNTOUCHED, contract=True)


def resumes(bench: Bench, layout: Layout) -> Iterator[Relation]:
    """Go on in a fresh optimizer that loaded the state, and in a copy.

    Args:
        bench: in a dtype that loading may cast state to, fine enough to show a step beside the weights.
        layout: its groups and tensors.
    """
    base = bench.run(layout.groups, layout.leaves, watched=True)
    for how, claim in (("state_dict", RESUMES), ("copy", COPIES)):
        try:
            run = bench.run(layout.groups, layout.leaves, resume=how)
        except Exception as error:
            seen = f"it raised {type(error).__name__}: {_short(error)}"
            yield broken(claim, seen, contract=True) if how == "state_dict" else does_not_apply(claim, seen)
            continue
        arithmetic = arithmetic_of(base, bench.dtype)
        if apart := first_apart(base.path, run.path, layout.names, bench.dtype, arithmetic):
            where = "state_dict() and load_state_dict() do not carry" if how == "state_dict" else "a copy does not have"
            seen = f"saved after step {bench.saved_after}, step {apart[1]} goes another way: it has state that {where}"
            yield broken(claim, seen, contract=how == "state_dict")
        else:
            yield holds(claim, contract=how == "state_dict")


def order(bench: Bench, layout: Layout, base: Run) -> Relation:
    """Hand over the tensors of each group in the opposite order."""
    if base.drew:
        return does_not_apply(ORDER, "it draws random numbers, in the order of the tensors")
    turned = tuple(Group(g.options, g.names[::-1]) for g in layout.groups)
    run = bench.run(turned, layout.leaves)
    if apart := first_apart(base.path, run.path, layout.names, bench.dtype, arithmetic_of(base, bench.dtype)):
        seen = (
            f"in the opposite order the {_kind(apart[0])} goes elsewhere at step {apart[1]}, {apart[2]:.2g} of a step"
        )
        return broken(ORDER, f"{seen}: state or scalars of one tensor reach another", contract=True)
    if bench.coupled is False and (seen := _elsewhere_beside_a_silent_one(bench, layout, base)):
        return broken(ORDER, f"{seen}: its state is filed by its place", contract=True)
    return holds(ORDER, contract=True)


def _elsewhere_beside_a_silent_one(bench: Bench, layout: Layout, base: Run) -> str:
    """Return what goes elsewhere where the first tensor of each group has no gradient any more; empty for nothing."""
    silent = {group.names[0]: bench.saved_after for group in layout.groups}
    try:
        run = bench.run(layout.groups, layout.leaves, silent=silent)
    except Exception:  # `untouched` tells
        return ""
    others = [name for name in layout.names if name not in silent]
    apart = first_apart(base.path, run.path, others, bench.dtype, arithmetic_of(base, bench.dtype))
    return f"where another tensor has no gradient any more, the {_kind(apart[0])} goes elsewhere" if apart else ""


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
    within = [a for run, n in zip(alone, kept, strict=True)
              if (a := first_apart(run.path, base.path, n, bench.dtype, arithmetic))]  # fmt: skip
    bench.coupled = bool(coupled or within)  # within: by what a group keeps for all its tensors, as AvaGrad's gamma
    pair = _TwoGroups(bench, layout, own.options, kept, alone, together, arithmetic, coupled=bool(coupled))
    changes = variant(own.options, bench.recipe.defaults)
    with contextlib.suppress(Exception):
        if not coupled and not pair.ignored(changes):  # all at once; one by one only to name the wrong one
            changes = {}
    seen: list[str] = []
    for key, value in changes.items():
        try:
            problem = pair.ignored({key: value})
        except Exception as error:
            if key == "lr":
                return does_not_apply(GROUPS, f"it refuses groups of different lr ({_short(error)})")
            continue
        if problem:
            seen.append(problem)
    shared = sorted(_estimates(together, alone))
    if seen and shared:
        return does_not_apply(GROUPS, f"it estimates {' and '.join(shared)} for all groups together; {'; '.join(seen)}")
    if seen:
        return broken(GROUPS, "; ".join(seen), contract=True)
    if coupled:
        one_norm = "a tensor's step depends on the other tensors, as by a norm of all gradients"
        return holds(GROUPS, one_norm, contract=True)
    return holds(GROUPS, contract=True)


@dataclasses.dataclass(frozen=True)
class _TwoGroups:
    """Two groups of one optimizer, whose runs with the same options are known: together, and each alone."""

    bench: Bench
    layout: Layout
    options: Mapping[str, Any]
    names: tuple[tuple[str, ...], tuple[str, ...]]
    alone: tuple[Run, ...]
    together: Run
    arithmetic: torch.dtype
    coupled: bool

    def ignored(self, changes: dict[str, Any]) -> str:
        """Return how options that the second group alone is given are ignored, or nothing."""
        other = Group({**self.options, **changes}, self.names[1])
        meant = self.bench.run((other,), self.layout.leaves, defaults=changes)
        if not self._apart(meant, self.alone[1], 1):
            return ""  # an option that changes nothing, even given to the constructor, is another relation's
        both = self.bench.run((Group(self.options, self.names[0]), other), self.layout.leaves)
        what = f"{', '.join(f'{k}={v!r}' for k, v in changes.items())} of the second group"
        if not self._apart(both, self.together, 1):
            return f"{what} is ignored: it moves as without it"
        if self.coupled:  # what it would do alone is not known
            return ""
        if self._apart(both, meant, 1):
            return f"{what} is not what it is stepped with: alone in an optimizer with it the group goes another way"
        if self._apart(both, self.alone[0], 0):
            return f"{what} changes what the first group does"
        return ""

    def _apart(self, one: Run, other: Run, group: int) -> bool:
        names = self.names[group]
        return first_apart(one.path, other.path, names, self.bench.dtype, self.arithmetic) is not None


def _estimates(run: Run, alone: tuple[Run, ...]) -> set[str]:
    """Return what the steps keep in the groups, alike in all and other than in each alone: estimates from all tensors.

    Prodigy and D-Adaptation sum over all groups for the one step size of them all.
    """
    groups = run.optimizer.param_groups
    found: set[str] = set()
    for key, value in groups[0].items():
        if key in ("lr", "params") or not isinstance(value, (float, torch.Tensor)):
            continue
        if isinstance(value, torch.Tensor) and value.numel() != 1:
            continue
        number, alike = float(value), all(float(g.get(key, 0.0)) == float(value) for g in groups)
        other = all(float(a.optimizer.param_groups[0].get(key, number)) != number for a in alone)
        if alike and other:
            found.add(key)
    return found


def _kind(name: str) -> str:
    return name.rpartition(" ")[0].rpartition(", ")[2] + " tensor"


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:160] + ("..." if len(text) > 160 else "")
