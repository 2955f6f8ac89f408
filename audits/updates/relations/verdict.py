"""All relations of one optimizer, and what they make of it: `optimizer.invariants` and the rows of `update.rule`."""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from audits.causes import Cause
from audits.live.subject import LivePhase, Subject
from audits.outcomes import Lane, Outcome, ResultRow
from audits.updates.compare import real_dtype
from audits.updates.relations import contract, descent, elements, numbers, options
from audits.updates.relations.bench import PLAIN, Bench, Run, StepRequest, request_of
from audits.updates.relations.bench_loss import LATE
from audits.updates.relations.layout import Layout, layout, own_layout
from audits.updates.relations.relation import Held, Relation, does_not_apply, first_apart, moved
from audits.updates.update_rows import row

CHECK = "optimizer.invariants"

_KNOWN: weakref.WeakKeyDictionary[LivePhase, Verdict] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Verdict:
    """What the relations say of a phase's optimizer.

    Attributes:
        relations: each one.
        unable: why none could be tried; empty where they were.
        request: how the optimizer was stepped.
        anew: whether its constructor made it, for a copy of the live object does not step on other tensors.
    """

    relations: tuple[Relation, ...]
    unable: str = ""
    request: StepRequest = PLAIN
    anew: bool = False

    @property
    def outcome(self) -> Outcome:
        """Pass, warn for a broken relation, fail for one of torch's contract, inconclusive where none was tried."""
        if self.unable:
            return Outcome.INCONCLUSIVE
        gone = self.broken
        return Outcome.FAIL if any(r.contract for r in gone) else Outcome.WARN if gone else Outcome.PASS

    @property
    def broken(self) -> list[Relation]:
        """The relations that do not hold, torch's contract first."""
        return sorted((r for r in self.relations if r.held is Held.NO), key=lambda r: not r.contract)

    def message(self, name: str) -> str:
        """Return one sentence for each relation."""
        if self.unable:
            return f"{name} has no reference rule, and the relations could not be tried: {self.unable}"
        seen = [f"BROKEN: {r.claim}: {r.seen}" for r in self.broken]
        kept = [r.claim + (f" ({r.seen})" if r.seen else "") for r in self.relations if r.held is Held.YES]
        left = [f"{r.claim} ({r.seen})" for r in self.relations if r.held is Held.OPEN]
        text = f"{name} has no reference rule and was held to what every optimizer keeps"
        text += f", {self.request.description}" if self.request.description else ""
        text += ", built anew by its constructor from its options" if self.anew else ""
        return (
            "; ".join([text, *seen])
            + f". {len(kept)} hold: {'; '.join(kept)}"
            + (f". Not applicable: {'; '.join(left)}" if left else "")
        )


def verdict_of(subject: Subject, phase: LivePhase) -> Verdict:
    """Return the verdict at the subject's seed; worked out once for a phase."""
    if phase not in _KNOWN:
        _KNOWN[phase] = judge(subject, phase, subject.seed)
    return _KNOWN[phase]


def relation_rows(subject: Subject, phase: LivePhase, seed: int) -> list[ResultRow]:
    """Return the ``optimizer.invariants`` row of a phase whose optimizer has no reference rule.

    Args:
        subject: the model under audit; it is not touched.
        phase: whose optimizer.
        seed: of the synthetic tensors and of every run.
    """
    found = verdict_of(subject, phase) if seed == subject.seed else judge(subject, phase, seed)
    name = phase.recipe.optimizer.class_path
    gone = found.broken
    cause = Cause.COULD_NOT_STEP if found.unable else "; ".join(r.claim for r in gone) if gone else Cause.RELATIONS
    fields: dict[str, Any] = {"phase": phase.name, "lane": Lane.SYNTHETIC, "cause": cause}
    return [row(subject, CHECK, found.outcome, found.message(name), **fields)]


def round_trip_rows(subject: Subject, phase: LivePhase, seed: int) -> list[ResultRow]:
    """Return the ``registration.state-round-trip`` row: what the relation of saving and loading says.

    Args:
        subject: the model under audit; it is not touched.
        phase: whose optimizer.
        seed: as `relation_rows` takes it.
    """
    found = verdict_of(subject, phase) if seed == subject.seed else judge(subject, phase, seed)
    relation = next((r for r in found.relations if r.claim == contract.RESUMES), None)
    held = Held.OPEN if relation is None else relation.held
    seen = found.unable if relation is None else relation.seen
    outcome = {Held.YES: Outcome.PASS, Held.NO: Outcome.FAIL, Held.OPEN: Outcome.INCONCLUSIVE}[held]
    message = f"the optimizer of phase {phase.name!r}: {contract.RESUMES}" + (f": {seen}" if seen else "")
    cause = Cause.COULD_NOT_STEP if held is Held.OPEN else None
    return [row(subject, "registration.state-round-trip", outcome, message, phase=phase.name, lane=Lane.SYNTHETIC,
                cause=cause)]  # fmt: skip


def working_request(subject: Subject, phase: LivePhase) -> StepRequest:
    """Return how a class that no rule is known for is asked for a step."""
    return verdict_of(subject, phase).request


def relation_limits(subject: Subject, rows: Iterable[ResultRow]) -> tuple[str, ...]:
    """Return the sentence a report ends its headline with when an optimizer was judged by relations."""
    judged = {r.phase for r in rows if r.check == CHECK and r.outcome.resolved}
    names = [p.recipe.optimizer.class_path.rpartition(":")[2] for p in subject.phases if p.name in judged]
    if not names:
        return ()
    return (
        f"Judged by relations: {', '.join(dict.fromkeys(names))} has no reference rule, and was held to what every "
        "optimizer keeps, not to a formula.",
    )


def judge(subject: Subject, phase: LivePhase, seed: int) -> Verdict:
    """Try every relation on a phase's optimizer.

    Args:
        subject: for the device and the kinds of tensors.
        phase: whose optimizer.
        seed: of the tensors and of every run.
    """
    chosen = layout(subject, phase, seed)
    if not chosen.names:
        return Verdict((), unable="it holds no parameter of the model")
    found = _able(subject, phase, chosen, seed)
    if isinstance(found, str) and (own := own_layout(subject, phase, seed)) is not None:
        again = _able(subject, phase, own, seed)
        if not isinstance(again, str):
            found, chosen = again, own
    if isinstance(found, str):
        return Verdict((), unable=found)
    bench, base = found
    bench.faithful = _faithful(bench, chosen, base)
    held = {n for g in phase.recipe.optimizer.groups[:1] for n in g.parameters if isinstance(n, str)}
    shapes = [tuple(subject.parameters[n].shape) for n in held]
    native = real_dtype(next(iter(phase.parameters.values())).dtype) if phase.parameters else bench.dtype
    relations: list[Relation] = []
    for claim, run in _all(bench, chosen, base, shapes, seed, native):
        try:
            found_here = run()
            relations += [found_here] if isinstance(found_here, Relation) else list(found_here)
        except Exception as error:  # the class is the user's: what it cannot do is no relation broken
            seen = f"it raised {type(error).__name__}: {' '.join(str(error).split())[:160]}"
            relations.append(does_not_apply(claim, seen))
    anew = bench.recipe.kept is None and phase.recipe.optimizer.kept is not None
    return Verdict(tuple(_matrices_apart(relations)), request=bench.request, anew=anew)


def _matrices_apart(relations: list[Relation]) -> Iterator[Relation]:
    """Hold no rule of whole tensors to float64: inverses and roots of near-singular matrices lose float32's digits.

    Such a rule also guards them by its dtype's own eps, so that it is another one in each (LoRA-RITE: half a percent).
    """
    whole = any(r.claim == elements.PIECES and r.held is Held.OPEN for r in relations)
    for r in relations:
        apart = whole and r.claim == numbers.FLOAT32 and r.held is Held.NO
        yield does_not_apply(r.claim, f"{r.seen}, in a rule of whole tensors") if apart else r


def _all(
    bench: Bench, chosen: Layout, base: Run, shapes: list[tuple[int, ...]], seed: int, native: torch.dtype
) -> Iterator[tuple[str, Callable[[], Relation | Iterable[Relation]]]]:
    yield contract.REPEATS, lambda: contract.repeats(bench, chosen, base)
    yield contract.UNTOUCHED, lambda: contract.untouched(bench, chosen)
    yield contract.GROUPS, lambda: contract.groups(bench, chosen, base)
    yield contract.ORDER, lambda: contract.order(bench, chosen, base)
    # What loading casts state to is the weights' dtype; in a coarse one a step is lost beside the weights.
    shown = native if native is torch.float64 else torch.float32
    yield contract.RESUMES, lambda: list(contract.resumes(bench.using(dtype=shown), chosen))
    yield elements.PIECES, lambda: elements.pieces(bench, chosen, shapes, seed, drew=base.drew)
    yield options.STILL, lambda: options.still(bench, chosen)
    yield options.USED, lambda: options.used(bench, chosen)
    yield options.MAXIMIZE, lambda: options.maximize(bench, chosen)
    yield numbers.KERNELS, lambda: numbers.kernels(bench, chosen, base)
    yield numbers.FLOAT32, lambda: list(numbers.precision(bench, chosen, base))
    yield descent.FALLS, lambda: descent.falls(bench, chosen)


def _faithful(bench: Bench, chosen: Layout, base: Run) -> bool:
    """Whether the constructor, given the recorded options, makes an optimizer that goes as the live one does."""
    try:
        bench.faithful = True
        run = bench.run(chosen.groups, chosen.leaves, defaults={})
    except Exception:
        return False
    return first_apart(base.path, run.path, chosen.names, bench.dtype) is None


def _able(subject: Subject, phase: LivePhase, chosen: Layout, seed: int) -> tuple[Bench, Run] | str:
    """Return a bench on which the optimizer steps, float64 where it does, and its run; or why there is none."""
    first: Exception | None = None
    recipe = phase.recipe.optimizer
    others = (StepRequest(graph=True), StepRequest(closure=True), StepRequest(closure=True, graph=True))
    requests = dict.fromkeys((request_of(recipe), *others))
    # A copy on other tensors lacks what a constructor files by tensor (SaRA's masks): then as the constructor makes it.
    for made in (recipe, dataclasses.replace(recipe, kept=None)):
        for request, dtype in itertools.product(requests, (torch.float64, torch.float32)):
            bench = Bench(made, subject.device, dtype, request, seed)
            try:
                base = bench.run(chosen.groups, chosen.leaves, watched=True)
                if not any(moved(base.path, name) for name in chosen.names):
                    bench = bench.using(steps=LATE)
                    base = bench.run(chosen.groups, chosen.leaves, watched=True)
                return bench, base
            except Exception as error:
                first = first or error
    return f"its step raises {type(first).__name__}: {' '.join(str(first).split())[:200]}"
