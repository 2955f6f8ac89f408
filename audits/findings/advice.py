"""What to do about a warning or an open claim, or that nothing needs doing: the end of every such message."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from audits.globs import matches
from audits.outcomes import Outcome, ResultRow

#: How advice begins. A message that holds one of them, in any case, says what to do.
TO_DO, NOTHING = "To do: ", "nothing needs doing"

_OPEN, _WARN = Outcome.INCONCLUSIVE, Outcome.WARN

_AGAIN = "audit this parameter alone with another seed (--parameter NAME --seed 1)"
_REPEATABLE = (
    "make the loss repeatable: seed what draws outside torch's generators, call "
    "torch.use_deterministic_algorithms(True)"
)
_BY_HAND = "run the loss once on model.double() with the batch in float64: it raises the same there"


@dataclass(frozen=True)
class _Advice:
    """Advice on rows of a check (a glob) and an outcome whose cause begins so."""

    check: str
    outcome: Outcome
    text: str
    cause: str = ""

    def fits(self, row: ResultRow) -> bool:
        same = row.outcome is self.outcome and matches(row.check, self.check)
        return same and (row.cause or "").startswith(self.cause)


#: The first that fits is given.
_TABLE = (
    _Advice("*", _OPEN, "register the version and audit that: it is audited in a process of its own", "first call"),
    _Advice("*", _OPEN, f"{NOTHING} unless it comes again", "not reproduced"),
    _Advice("gradient.*", _OPEN, f"{NOTHING} about a few such tensors; of many, audit after some training, or with "
            "another batch, where their gradients show", "unresolved"),
    _Advice("gradient.*", _OPEN, _REPEATABLE, "nondeterministic"),
    _Advice("gradient.*", _OPEN, f"{_AGAIN}; if it stays open, look for arithmetic below float64 in what the loss "
            "calls", "unconfirmed exceedance"),
    _Advice("gradient.*", _OPEN, "give another batch, or write the branch with torch.where", "Python branches"),
    _Advice("gradient.*", _OPEN, "give a batch on which the loss depends on the parameters", "the loss is exactly"),
    _Advice("gradient.*", _OPEN, f"{_AGAIN}, where the whole budget is its own", "not judged within"),
    _Advice("gradient.*", _OPEN, "write the branch in Python that depends on a value with torch.where",
            "cannot evaluate: BranchMismatch"),
    _Advice("gradient.*", _OPEN, _BY_HAND, "cannot evaluate"),
    _Advice("gradient.compiled", _OPEN, "audit the bare module (model._orig_mod) too: what passes there and not here "
            "is the compiler's"),
    _Advice("gradient.native-dtype", _OPEN, "look at the size of the operation's inputs: its gradient leaves the "
            "range of the dtype"),
    _Advice("gradient.*", _OPEN, _AGAIN),
    _Advice("gradient.*", _WARN, "mend it if you use this gradient, in an attack or a sensitivity say; else "
            f"{NOTHING}"),
    _Advice("update.*", _OPEN, "give a batch that uses the parameter, or freeze it", "no gradient"),
    _Advice("update.*", _OPEN, f"{NOTHING} where optimizer.probe passes: it saw the rule at work on other gradients; "
            "else audit later in training", "unresolved"),
    _Advice("update.*", _OPEN, "audit at a step at which the learning rate is not 0", "lr is 0"),
    _Advice("update.*", _OPEN, "mend what the step raised, or declare the step with Recipe.capture(..., step=...)",
            "step raised"),
    _Advice("update.*", _OPEN, "keep the state under the names the rule has, or give a rule of your own: "
            "expect={'optimizer_rule': function}", "state under other names"),
    _Advice("*", _OPEN, "make what the recipe leaves out storable (plain values, importable functions), or audit in "
            "process", "not whole"),
    _Advice("update.*", _OPEN, f"{NOTHING} where optimizer.probe passes in this precision; else audit in float32",
            "precision"),
    _Advice("update.rule", _WARN, "look at what the relation says of the optimizer, or give its rule: "
            "expect={'optimizer_rule': function}"),
    _Advice("update.rule", _OPEN, "give the optimizer's rule: expect={'optimizer_rule': function}"),
    _Advice("update.outside-step", _WARN, f"{NOTHING}: it is declared"),
    _Advice("update.lost-to-rounding", _WARN, "keep float32 master weights or round stochastically; in float32, raise "
            "the learning rate or stop training"),
    _Advice("optimizer.*", _OPEN, "step the optimizer by hand on copies of its parameters: it raises the same there",
            "probe raised"),
    _Advice("optimizer.*", _OPEN, "compare with foreach=False, fused=False; a class of your own is judged by a rule in "
            "expect={'optimizer_rule': function}"),
    _Advice("optimizer.*", _WARN, "compare with foreach=False, fused=False, and keep the one that agrees"),
    _Advice("step.gradient-present", _WARN, "look for dead units or a branch that this batch does not use; another "
            "batch tells which"),
    _Advice("step.gradient", _OPEN, _REPEATABLE, "nondeterministic"),
    _Advice("step.gradient", _OPEN, "mend what the loss raised, or give the loss the step really uses", "no reference"),
    _Advice("step.gradient*", _OPEN, "capture the batch as the step gives it to the loss, and call the declared loss "
            "in the step"),
    _Advice("step.gradient*", _WARN, f"{NOTHING} where the step is meant to draw its minibatch; else give the loss the "
            "whole batch"),
    _Advice("step.clipping", _WARN, "declare it: clip_grad_norm=..., or take the clipping out"),
    _Advice("step.count", _OPEN, "audit with a lower initial loss scale, at which no step is skipped"),
    _Advice("step.*", _OPEN, "call every phase's optimizer in the declared step, as training does"),
    _Advice("step.*", _WARN, "declare in the recipe what is meant, or mend the step"),
    _Advice("registration.*", _WARN, "assign Parameters themselves, and freeze before the optimizer is built"),
    _Advice("registration.*", _OPEN, "build the optimizer from model.parameters(), last"),
    _Advice("buffers.batch-norm", _OPEN, f"{NOTHING} if its own formula is tested elsewhere: torch's does not hold for "
            "it", "own class"),
    _Advice("buffers.*", _OPEN, "declare the average: expect={'ema': {...}} with the names that exist"),
    _Advice("buffers.*", _WARN, "declare the average that is meant, expect={'ema': {...}}, or mend its update"),
    _Advice("health.vanishing", _WARN, "look at initialisation, normalisation and residual paths; of a converged model "
            f"{NOTHING}"),
    _Advice("health.exploding", _WARN, "clip the norm, or lower the learning rate"),
    _Advice("health.all-zero", _WARN, "look for dead units or a branch that this batch does not use; another batch "
            "tells which"),
    _Advice("health.update-ratio", _WARN, "lower the learning rate, or warm it up"),
    _Advice("health.dead-relu", _WARN, "look at the biases before it and at the learning rate; another batch tells "
            "whether the units are dead"),
    _Advice("health.saturation", _WARN, "scale the inputs and the weights before it down"),
    _Advice("audit.completed", _OPEN, "give a smaller batch, or audit on the CPU (--device cpu)", "out of memory"),
    _Advice("audit.completed", _OPEN, "mend what it names and audit again"),
    _Advice("model.whole", _WARN, "log the model with a factory: registry_models.log_model(model, NAME, factory=...)"),
    _Advice("recipe.*", _WARN, "register the version with its recipe, or trust it in the recipes folder"),
    _Advice("recipe.*", _OPEN, "attach a recipe: registry_models.attach_recipe(VERSION, Recipe.capture(...))"),
    _Advice("*", _OPEN, _AGAIN),
    _Advice("*", _WARN, "look where the finding points, and waive it if it is meant"),
)  # fmt: skip


def says_what_to_do(message: str) -> bool:
    """Whether a message holds advice, or that none is needed."""
    return TO_DO in message or NOTHING in message.lower()


def advice_for(row: ResultRow) -> str | None:
    """Return what to do about a row; None for rows that pass, fail or were skipped (a failure's text names its cure).

    Args:
        row: the row.
    """
    return next((a.text for a in _TABLE if a.fits(row)), None)


def without_advice(message: str) -> str:
    """Return a message without the advice at its end, for a row whose outcome becomes another one."""
    return message.partition(f". {TO_DO}")[0]


def with_advice(rows: Iterable[ResultRow]) -> list[ResultRow]:
    """Return the rows, the message of every warning and open claim ending in what to do about it.

    Args:
        rows: the rows.
    """
    return [r if says_what_to_do(r.message) else _advised(r) for r in rows]


def _advised(row: ResultRow) -> ResultRow:
    text = advice_for(row)
    if text is None:
        return row
    start = f"{row.message.rstrip('. ')}. " if row.message else ""
    return dataclasses.replace(row, message=f"{start}{TO_DO}{text}")
