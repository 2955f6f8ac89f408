"""Whether the optimizer under audit is the one that trains: all of it, or only what a recipe could hold."""

from __future__ import annotations

import dataclasses

import torch

from audits.causes import Cause
from audits.live.subject import LivePhase, Subject
from audits.outcomes import Outcome, ResultRow
from audits.recipe.constructing import mould_of_recipe, optimizer_class
from audits.recipe.moulds import callable_name, hooks_of, own_step
from audits.recipe.phases import OptimizerRecipe
from audits.updates.update_rows import row

_CHECK = "registration.optimizer-whole"

#: Claims about what the optimizer does: of another object they say nothing.
_ABOUT_THE_OPTIMIZER = (
    "step.gradient",
    "update.rule",
    "update.state",
    "update.outside-step",
    "optimizer.probe",
    "optimizer.parity",
    "optimizer.invariants",
    "registration.state-round-trip",
)

#: Of these, what a hook or a step around the rule cannot have caused: a fault of the rule itself stays one.
_AROUND = ("the step pre-hook", "the step post-hook", "the step set on the instance")


def missing_of(recipe: OptimizerRecipe) -> tuple[str, ...]:
    """Return, in words, what the optimizer that trains has and the one under audit has not."""
    kept = recipe.kept
    if kept is None:
        cls = optimizer_class(recipe)
        if getattr(torch.optim, cls.__name__, None) is cls:
            return ()
        return ("whatever its constructor does not make of the recorded options (the recipe records no attributes)",)
    return () if kept.live else kept.missing


def whole_rows(subject: Subject) -> list[ResultRow]:
    """Return ``registration.optimizer-whole``, a row per phase."""
    return [_whole_row(subject, phase) for phase in subject.phases]


def _whole_row(subject: Subject, phase: LivePhase) -> ResultRow:
    recipe = phase.recipe.optimizer
    missing = missing_of(recipe)
    if missing:
        message = (
            f"the optimizer of phase {phase.name!r} ({recipe.class_path}) is audited without what its recipe "
            f"could not hold: {', '.join(missing)}; so its updates are not judged; {_cure(recipe)}"
        )
        return row(subject, _CHECK, Outcome.INCONCLUSIVE, message, phase=phase.name, cause=Cause.NOT_WHOLE)
    message = f"the optimizer of phase {phase.name!r} is audited as it trains: class, options, state"
    mould = mould_of_recipe(recipe)
    if mould is not None:
        around = [f"{kind} {callable_name(hook)}" for kind, hook in hooks_of(mould)]
        if (step := own_step(mould)) is not None:
            around.append(f"step set on the instance {callable_name(step)}")
        message += ", attributes" + (f", {', '.join(around)}" if around else "")
    if phase.starts_fresh:
        message += "; it keeps moments or counts beside `state`, so its steps are judged from its beginning on"
    return row(subject, _CHECK, Outcome.PASS, message, phase=phase.name)


def _cure(recipe: OptimizerRecipe) -> str:
    if recipe.kept is None:
        return "capture the recipe anew; a recipe written by hand says `attributes: {}` where there are none"
    return ("move functions to a module that can be imported, and keep plain values (numbers, text, tensors and "
            "containers of these) on the optimizer; in process the live optimizer itself is audited")  # fmt: skip


def without_false_verdicts(subject: Subject, rows: list[ResultRow]) -> list[ResultRow]:
    """Return the rows, those inconclusive that would be a verdict about another object than the one that trains."""
    missing = {p.name: found for p in subject.phases if (found := missing_of(p.recipe.optimizer))}
    return [_reserved(r, missing) if missing else r for r in rows]


def _reserved(r: ResultRow, missing: dict[str, tuple[str, ...]]) -> ResultRow:
    of = [what for phase, what in missing.items() if r.phase in (None, phase)]
    if r.check not in _ABOUT_THE_OPTIMIZER or not of or r.outcome not in (Outcome.PASS, Outcome.WARN, Outcome.FAIL):
        return r
    lacks = [name for names in of for name in names]
    if r.outcome is Outcome.FAIL and all(name.startswith(_AROUND) for name in lacks):
        return r
    message = f"{r.message}; but this is the optimizer without {', '.join(lacks)}: see {_CHECK}"
    return dataclasses.replace(r, outcome=Outcome.INCONCLUSIVE, message=message, cause=Cause.NOT_WHOLE)
