"""One line a parameter, in the model's order: what its gradient and its update came to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from audits.outcomes import GRADIENT_EVIDENCE, SUMMED_UP, UPDATE_EVIDENCE, Outcome, ResultRow, finite

#: The place of each outcome among those that sum a parameter up.
RANK = {outcome: rank for rank, outcome in enumerate(SUMMED_UP)}

_UPDATE_FAMILIES = ("update", "optimizer")


@dataclass
class ParameterLine:
    """What an audit found about one parameter.

    Attributes:
        index: place in the model's order, from 0.
        name: canonical parameter name.
        group: the part of the network it is folded under.
        gradient: outcome of the gradient claims; None when nothing was said.
        update: outcome of the update claims; None when nothing was said.
        other: worst non-pass outcome of all other claims; None when they hold.
    """

    index: int
    name: str
    group: str
    module: str = ""
    numel: int | None = None
    dtype: str = ""
    gradient: Outcome | None = None
    update: Outcome | None = None
    other: Outcome | None = None
    gradient_norm: float | None = None
    gradient_error: float | None = None
    detection_limit: float | None = None
    parameter_norm: float | None = None
    update_norm: float | None = None
    update_error: float | None = None
    update_threshold: float | None = None
    checks: list[str] = field(default_factory=list)

    @property
    def update_ratio(self) -> float | None:
        """``||update|| / ||parameter||``; None where either is unknown or the parameter is zero."""
        if self.update_norm is None or not self.parameter_norm:
            return None
        return self.update_norm / self.parameter_norm

    @property
    def within(self) -> tuple[str, str]:
        """The name in two parts: the group's, with its dot, and the rest."""
        prefix = f"{self.group}." if self.name.startswith(f"{self.group}.") else ""
        return prefix, self.name.removeprefix(prefix)

    @property
    def worst(self) -> Outcome:
        """The worst outcome of the line; a parameter about which nothing was judged is skipped."""
        said = [outcome for outcome in (self.gradient, self.update, self.other) if outcome is not None]
        return min(said, key=RANK.__getitem__, default=Outcome.SKIPPED)


def shown_outcome(row: ResultRow) -> Outcome:
    """Return the outcome as it counts for the version: a failed claim of severity warn, or a waived one, only warns."""
    return row.counted


def is_parameter(row: ResultRow) -> bool:
    """Whether the row is about a parameter, rather than the whole model or a tensor of the batch."""
    return row.parameter is not None and not row.parameter.startswith("<batch")


def parameter_lines(rows: Sequence[ResultRow], unresolved: Iterable[str] = ()) -> list[ParameterLine]:
    """Return one line per parameter, in the order in which the gradient checks, then the others, name them.

    Args:
        rows: an audit's rows.
        unresolved: trainable parameters that no row resolves; those without any row get a line too.
    """
    named = [row for row in rows if is_parameter(row)]
    evidence = sorted(named, key=lambda row: (row.check != GRADIENT_EVIDENCE, row.check != UPDATE_EVIDENCE))
    names = dict.fromkeys([str(row.parameter) for row in evidence] + list(unresolved))
    lines = {name: ParameterLine(index, name, group_of(name)) for index, name in enumerate(names)}
    kept: dict[tuple[str, str], Outcome] = {}
    for row in named:
        line = lines[str(row.parameter)]
        line.module = line.module or row.module or ""
        line.dtype = line.dtype or row.dtype or ""
        line.numel = row.numel if line.numel is None else line.numel
        line.parameter_norm = finite(row.parameter_norm) if line.parameter_norm is None else line.parameter_norm
        _count(line, row)
        if row.check in (GRADIENT_EVIDENCE, UPDATE_EVIDENCE):
            before = kept.get((line.name, row.check))
            if before is None or RANK[row.counted] < RANK[before]:
                kept[line.name, row.check] = row.counted
                _measure(line, row)
    return list(lines.values())


def group_of(name: str) -> str:
    """Return the part of the network a parameter is folded under: its path up to the first numbered module.

    >>> group_of("transformer.h.3.attn.c_proj.weight")
    'transformer.h.3'
    >>> group_of("transformer.wte.weight")
    'transformer.wte'
    """
    path = name.split(".")[:-1]
    for position, part in enumerate(path):
        if part.isdigit():
            return ".".join(path[: position + 1])
    return ".".join(path) or "top level"


def relative_error(row: ResultRow) -> float | None:
    """Return ``|measured - expected| / max(|measured|, |expected|)``, or the row's own error where it has no pair.

    Two numbers that are both within the row's bound cannot be told from zero: then there is no relative error. A
    direction through several tensors can add up to almost nothing; the error of a row that passes is then stated as
    its share of the detection limit.
    """
    measured, expected, error = finite(row.measured), finite(row.expected), finite(row.error)
    if measured is None or expected is None:
        return error
    larger = max(abs(measured), abs(expected))
    if larger == 0:
        return 0.0
    if row.threshold is not None and larger <= row.threshold:
        return None
    relative = abs(measured - expected) / larger
    limit = finite(row.detection_limit)
    if row.outcome is Outcome.PASS and limit is not None and error is not None and row.threshold:
        return min(relative, limit * error / row.threshold)
    return relative


def _count(line: ParameterLine, row: ResultRow) -> None:
    """Take the row's outcome into the line's column; only the evidence itself can make a column pass."""
    outcome = shown_outcome(row)
    quiet = outcome in (Outcome.PASS, Outcome.SKIPPED)
    column = "gradient" if row.family == "gradient" else "update" if row.family in _UPDATE_FAMILIES else "other"
    if quiet and row.check not in (GRADIENT_EVIDENCE, UPDATE_EVIDENCE):
        return
    before: Outcome | None = getattr(line, column)
    if before is None or RANK[outcome] < RANK[before]:
        setattr(line, column, outcome)
    if not quiet and row.check not in line.checks:
        line.checks.append(row.check)


def _measure(line: ParameterLine, row: ResultRow) -> None:
    if row.check == GRADIENT_EVIDENCE:
        line.gradient_norm = finite(row.gradient_norm)
        line.gradient_error = relative_error(row)
        line.detection_limit = finite(row.detection_limit)
    else:
        line.update_norm = finite(row.update_norm)
        line.update_error = finite(row.error)
        line.update_threshold = finite(row.threshold)
        line.parameter_norm = finite(row.parameter_norm) if row.parameter_norm is not None else line.parameter_norm
        line.gradient_norm = finite(row.gradient_norm) if line.gradient_norm is None else line.gradient_norm
