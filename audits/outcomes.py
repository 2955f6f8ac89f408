"""Outcomes, result rows, coverage and the verdict of a version. Knows no model and no tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from audits.causes import Cause


class Outcome(StrEnum):
    """What a check says. Neither ``inconclusive`` nor ``skipped`` ever counts as a pass."""

    PASS = "pass"
    WARN = "warn"
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"
    SKIPPED = "skipped"

    @property
    def resolved(self) -> bool:
        """Whether the claim was really judged."""
        return self in (Outcome.PASS, Outcome.WARN, Outcome.FAIL)


#: Worst first: the order in which findings are shown, and which step's row stands for a claim: one that says why it
#: was left out is not hidden by another step's pass.
WORST_FIRST = (Outcome.FAIL, Outcome.INCONCLUSIVE, Outcome.WARN, Outcome.SKIPPED, Outcome.PASS)

#: Which outcome stands for several claims about one thing, all checks of a parameter: the worst, and one that was
#: judged before one that was skipped.
SUMMED_UP = (Outcome.FAIL, Outcome.INCONCLUSIVE, Outcome.WARN, Outcome.PASS, Outcome.SKIPPED)

#: Which outcome stands for one claim in several phases, steps and lanes when two audits are compared: a finding of one
#: lane is not gone because another lane could not judge.
FINDINGS_FIRST = (Outcome.FAIL, Outcome.WARN, Outcome.INCONCLUSIVE, Outcome.PASS, Outcome.SKIPPED)


class Severity(StrEnum):
    """What an unmet claim does to the version: ``fail`` fails it, ``warn`` only warns."""

    FAIL = "fail"
    WARN = "warn"


class Family(StrEnum):
    """What a check is about: the part of its name before the dot."""

    REGISTRATION = "registration"
    STEP = "step"
    GRADIENT = "gradient"
    UPDATE = "update"
    OPTIMIZER = "optimizer"
    BUFFERS = "buffers"
    HEALTH = "health"
    AUDIT = "audit"
    MODEL = "model"
    RECIPE = "recipe"


class Lane(StrEnum):
    """How the subject was evaluated for a row."""

    NATIVE = "native"
    FLOAT64 = "float64"
    FLOAT32 = "float32"
    SYNTHETIC = "synthetic"


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """One check of one parameter (or of the whole model, when ``parameter`` is None).

    A row carries what is needed to judge it. ``error`` and ``threshold`` share one unit, which the check defines;
    ``measured`` and ``expected`` are the two numbers the check compared. ``detection_limit`` is the smallest relative
    error of the parameter's gradient (or update) that this row would have found. ``waiver`` is the reason, the owner
    and the end of the waiver that excuses the finding.
    """

    check: str
    outcome: Outcome
    severity: Severity = Severity.FAIL
    phase: str | None = None
    step: int | None = None
    lane: Lane | None = None
    parameter: str | None = None
    module: str | None = None
    numel: int | None = None
    dtype: str | None = None
    measured: float | None = None
    expected: float | None = None
    error: float | None = None
    threshold: float | None = None
    detection_limit: float | None = None
    parameter_norm: float | None = None
    gradient_norm: float | None = None
    update_norm: float | None = None
    seed: int | None = None
    cause: str | None = None
    message: str = ""
    where_to_look: str | None = None
    waiver: str | None = None

    @property
    def counted(self) -> Outcome:
        """The outcome as it counts for the version: a failure of severity warn, or a waived one, only warns."""
        excused = self.severity is Severity.WARN or self.waiver is not None
        return Outcome.WARN if self.outcome is Outcome.FAIL and excused else self.outcome

    @property
    def family(self) -> str:
        """The part of the check's name before the dot: ``gradient``, ``update``, ..."""
        return self.check.partition(".")[0]


#: The checks that resolve a parameter's gradient and its update; coverage counts parameters that have both.
GRADIENT_EVIDENCE = "gradient.finite-difference"
UPDATE_EVIDENCE = "update.rule"

#: The check that an optimizer received the declared loss's gradient: without it, neither of the two says what trains.
HANDED_OVER_EVIDENCE = "step.gradient"

#: Checks of which a row about no parameter in particular speaks for the whole audit: a part stopped, a step raised.
WHOLE_AUDIT = ("audit.completed", UPDATE_EVIDENCE, HANDED_OVER_EVIDENCE)


#: A version needs evidence from each of these families before it can pass.
REQUIRED_FAMILIES = (Family.REGISTRATION, Family.GRADIENT, Family.UPDATE)

#: Below this share of resolved trainable tensors a version that did not fail is ``inconclusive``: one tensor in
#: twenty, the share of normalisation scales and biases that a healthy converged network may leave unresolved.
MINIMUM_COVERAGE = 0.95


@dataclass(frozen=True)
class Coverage:
    """Share of the trainable parameters for which the gradient and the update were really resolved.

    Attributes:
        tensors: the share by tensors.
        elements: the share by elements.
        unresolved: names of those that were not.
        silent: names of those whose gradient is exactly zero, rightly so, or that the loss does not use: nothing was
            seen at work there. They count neither as covered nor as uncovered while they are the fewer half, and as
            uncovered beyond: a model without gradients learns nothing.
    """

    tensors: float
    elements: float
    unresolved: tuple[str, ...]
    silent: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, rows: Iterable[ResultRow], trainable: dict[str, int], assumed: frozenset[str] = frozenset()
    ) -> Coverage:
        """Count the trainable parameters whose gradient and update were both judged.

        Args:
            rows: the audit's rows.
            trainable: name -> number of elements of every trainable parameter.
            assumed: recipe fields nobody declared. An assumed loss leaves the gradients uncovered, an assumed
                optimizer the updates: nothing is resolved by guessing.

        Returns:
            Shares by tensors and by elements; 0 when the model has no trainable parameter.
        """
        gradient: set[str] = set()
        update: set[str] = set()
        zero: set[str] = set()
        unused: set[str] = set()
        for row in rows:
            if row.check == UPDATE_EVIDENCE and row.cause == Cause.UNUSED and row.parameter is not None:
                unused.add(row.parameter)
            if row.parameter is None or not row.outcome.resolved:
                continue
            if row.check == GRADIENT_EVIDENCE and "loss" not in assumed:
                gradient.add(row.parameter)
                if row.cause == Cause.ZERO_GRADIENT and row.gradient_norm == 0.0:
                    zero.add(row.parameter)
            elif row.check == UPDATE_EVIDENCE and "optimizer" not in assumed:
                update.add(row.parameter)
        resolved = gradient & update & trainable.keys()
        silent = (resolved | (unused & gradient & trainable.keys())) & zero
        resolved -= silent
        counted = dict(trainable)
        if len(silent) * 2 < len(trainable):
            counted = {name: size for name, size in trainable.items() if name not in silent}
        total = sum(counted.values())
        return cls(
            tensors=len(resolved) / len(counted) if counted else 0.0,
            elements=sum(counted[name] for name in resolved) / total if total else 0.0,
            unresolved=tuple(name for name in counted if name not in resolved),
            silent=tuple(name for name in trainable if name in silent),
        )


def open_claims(rows: Iterable[ResultRow]) -> list[ResultRow]:
    """Return the inconclusive rows that could have failed the version and whose claim no other row settles."""
    rows = list(rows)
    settled = {(row.check, row.phase, row.parameter) for row in rows if row.outcome.resolved}
    return [
        row
        for row in rows
        if row.outcome is Outcome.INCONCLUSIVE
        and row.severity is Severity.FAIL
        and row.waiver is None
        and (row.check, row.phase, row.parameter) not in settled
    ]


def decisive(rows: Sequence[ResultRow]) -> list[ResultRow]:
    """Return the open claims that leave the whole version undecided.

    A row about the whole audit (`WHOLE_AUDIT`); the gradient handed over, where it is open for more parameters than
    `MINIMUM_COVERAGE` lets be.
    """
    opened = open_claims(rows)
    handed = {row.parameter for row in rows if row.check == HANDED_OVER_EVIDENCE and row.parameter}
    unsure = [row for row in opened if row.check == HANDED_OVER_EVIDENCE and row.parameter]
    found = [row for row in opened if row.parameter is None and row.check in WHOLE_AUDIT]
    if len({row.parameter for row in unsure}) > (1.0 - MINIMUM_COVERAGE) * len(handed):
        found += unsure
    return found


def verdict(rows: Sequence[ResultRow], coverage: Coverage) -> Outcome:
    """Return the version's outcome.

    ``fail`` if any row of severity fail failed (a row says ``fail`` only when it was confirmed) and is not waived; else
    ``inconclusive`` if coverage is below `MINIMUM_COVERAGE`, a required family has no resolved row, or a `decisive`
    claim is open; else ``warn`` if anything warned or any claim that could have failed is open; else ``pass``.
    """
    if any(row.counted is Outcome.FAIL for row in rows):
        return Outcome.FAIL
    resolved = {row.family for row in rows if row.outcome.resolved}
    if coverage.tensors < MINIMUM_COVERAGE or not resolved.issuperset(REQUIRED_FAMILIES) or decisive(rows):
        return Outcome.INCONCLUSIVE
    if any(row.counted is Outcome.WARN for row in rows) or open_claims(rows):
        return Outcome.WARN
    return Outcome.PASS


def narrow_verdict(rows: Sequence[ResultRow]) -> Outcome:
    """Return the outcome of an audit of some checks or parameters: its own rows', whatever they leave uncovered."""
    counted = {row.counted for row in rows}
    if Outcome.FAIL in counted:
        return Outcome.FAIL
    if Outcome.INCONCLUSIVE in counted or not counted & {Outcome.PASS, Outcome.WARN}:
        return Outcome.INCONCLUSIVE
    return Outcome.WARN if Outcome.WARN in counted else Outcome.PASS


def finite(value: float | None) -> float | None:
    """Return the value, or None when it is missing, infinite or not a number (JSON and MLflow know neither)."""
    return value if value is not None and math.isfinite(value) else None
