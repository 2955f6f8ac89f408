"""Zero gradients that are nobody's mistake: parameters the loss does not reach, and biases whose gradient cancels."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from audits.causes import Cause
from audits.checks.registration import REACHES_LOSS
from audits.outcomes import GRADIENT_EVIDENCE, UPDATE_EVIDENCE, Outcome, ResultRow
from audits.wording import listed

_PRESENT, _ALL_ZERO = "step.gradient-present", "health.all-zero"

ADVICE = (
    "To do: what belongs in the loss is to be called there; else nothing needs doing, and freezing it "
    "(requires_grad_(False)) ends this warning"
)

#: Names of unused parameters that one warning lists; the number of the others follows.
NAMED = 20


def with_zeros_explained(rows: Sequence[ResultRow]) -> list[ResultRow]:
    """Return the rows with the zero gradients that have an innocent reason told as what they are.

    A parameter that the loss does not use (autograd gives nothing, and the finite difference confirms that the loss
    does not depend on it) has no update to be judged: the rows that notice are skipped, and one warning of
    `registration.reaches-loss` names all such parameters. Of a bias whose gradient cancels the warnings are skipped:
    its layer's weight has a gradient, hence the derivatives by the layer's outputs are not zero, and only their sum is.

    Args:
        rows: the audit's rows.
    """
    unused = unused_parameters(rows)
    alive = _alive(rows)
    told = []
    for r in rows:
        if r.parameter in unused and r.check == UPDATE_EVIDENCE and r.cause == Cause.NO_GRADIENT:
            text = f"{r.parameter} is not used by the loss: there is no update to judge"
            r = dataclasses.replace(r, outcome=Outcome.SKIPPED, cause=Cause.UNUSED, message=text)
        elif r.parameter in unused and r.check in (_PRESENT, _ALL_ZERO) and r.outcome is Outcome.WARN:
            text = f"{r.parameter} is not used by the loss: see {REACHES_LOSS.name}"
            r = dataclasses.replace(r, outcome=Outcome.SKIPPED, cause=Cause.UNUSED, message=text, where_to_look=None)
        elif r.check in (_PRESENT, _ALL_ZERO) and r.outcome is Outcome.WARN and _cancels(r.parameter, alive):
            text = f"{r.parameter}: its gradient sums up to zero, its layer's weight has one: nothing needs doing"
            r = dataclasses.replace(r, outcome=Outcome.SKIPPED, cause=Cause.CANCELS, message=text, where_to_look=None)
        told.append(r)
    return [*told, *_unused_row(unused)]


def _unused_row(unused: frozenset[str]) -> list[ResultRow]:
    """Return the one warning that names every parameter that no loss uses."""
    if not unused:
        return []
    names = sorted(unused)
    verb = "is not used by any loss" if len(names) == 1 else "are not used by any loss"
    message = (
        f"{listed(names, NAMED)} {verb} on this batch: trainable, without a gradient, and the losses do not depend "
    )
    message += "on them"
    return [
        ResultRow(check=REACHES_LOSS.name, outcome=Outcome.WARN, cause=Cause.UNUSED, message=f"{message}. {ADVICE}")
    ]


def unused_parameters(rows: Sequence[ResultRow]) -> frozenset[str]:
    """Return the parameters on which no phase's loss depends: no gradient, and a derivative of zero.

    Args:
        rows: an audit's rows.
    """
    zero: set[str] = set()
    other: set[str] = set()
    for r in rows:
        if r.check != GRADIENT_EVIDENCE or r.parameter is None or r.outcome is Outcome.SKIPPED:
            continue
        confirmed = r.outcome is Outcome.PASS and r.cause == Cause.ZERO_GRADIENT and r.gradient_norm == 0.0
        (zero if confirmed else other).add(r.parameter)
    without = {r.parameter for r in rows if r.check == UPDATE_EVIDENCE and r.cause in (Cause.NO_GRADIENT, Cause.UNUSED)}
    return frozenset((zero - other) & without)


def _alive(rows: Iterable[ResultRow]) -> set[str]:
    """Return the layers of which a weight has a gradient."""
    return {
        _layer(r.parameter)
        for r in rows
        if r.check == GRADIENT_EVIDENCE and r.parameter and r.gradient_norm and r.outcome is Outcome.PASS
        and r.cause != Cause.ZERO_GRADIENT and r.parameter.rpartition(".")[2] != "bias"
    }  # fmt: skip


def _cancels(name: str | None, alive: set[str]) -> bool:
    return name is not None and name.rpartition(".")[2] == "bias" and _layer(name) in alive


def _layer(name: str) -> str:
    """Return the path of the module that owns a parameter; a parametrized one belongs to the module around it."""
    return name.partition(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]
