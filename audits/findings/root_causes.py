"""One cause, one finding: the rows that go back to one root cause, told together, the cause first.

Rows say what was seen of each parameter. Eight parameters upstream of one wrong Function are eight rows and one
finding. Rows belong together where their cause and their phase are one, and where one check's failure is known to
follow from another's: a wrong rule shows in the update, in the state and on synthetic gradients; a module that was
replaced leaves a stale tensor in the optimizer and a parameter outside of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from audits.causes import Cause
from audits.checks import CHECKS
from audits.outcomes import WORST_FIRST, Outcome, ResultRow
from audits.wording import plural

#: Rows about the batch's own tensors name them like this: they are no parameters.
BATCH_PREFIX = "<batch "

#: Causes that are told by what they are of rather than by the check that saw them.
_TOLD_BY_PLACE = {
    Cause.STOP_GRADIENT: "a stop-gradient in {} cuts the gradient off",
    Cause.CANCELLED_GRADIENT: "the gradient cancels at {}",
    Cause.NO_CREATE_GRAPH: "{} uses a gradient that was taken without create_graph=True",
    Cause.WRONG_TOWARDS_LOSS: "the gradient is wrong between the loss and {}",
    Cause.BACKWARD_HOOK: "{} changes the gradient",
}

#: Failures that show again what another check of the phase shows: check -> those it follows from, the first that fails.
_FOLLOWS = {
    "update.state": ("update.rule",),
    "optimizer.probe": ("update.rule", "update.state"),
    "registration.coverage": ("registration.stale",),
    "update.frozen": ("registration.requires-grad",),
}

_NUMBER = re.compile(r"-?\d+\.?\d*(?:e[+-]?\d+)?")


@dataclass(frozen=True)
class RootFinding:
    """Rows that go back to one cause.

    Attributes:
        cause: what is wrong, a clause that names it first: ``ScaledGelu's backward is wrong``.
        rows: the rows, in the audit's order; the first stands for them.
    """

    cause: str
    rows: tuple[ResultRow, ...]

    @property
    def outcome(self) -> Outcome:
        """The outcome that counts for the version: the worst of the rows'."""
        return min((row.counted for row in self.rows), key=WORST_FIRST.index)

    @property
    def checks(self) -> tuple[str, ...]:
        """The checks that saw it."""
        return tuple(dict.fromkeys(row.check for row in self.rows))

    @property
    def parameters(self) -> tuple[str, ...]:
        """The parameters that it reaches."""
        names = (row.parameter for row in self.rows if row.parameter)
        return tuple(dict.fromkeys(name for name in names if not name.startswith(BATCH_PREFIX)))

    @property
    def waived(self) -> bool:
        """Whether somebody answers for all of it."""
        return all(row.waiver for row in self.rows)

    @property
    def where(self) -> str:
        """The parameters in words: one by its name (unless the cause holds it), of several the number and the first."""
        names = self.parameters
        if len(names) == 1 and names[0] in self.cause:
            return ""
        return f"{len(names):,} parameters, from {names[0]}" if len(names) > 1 else "".join(names)

    @property
    def text(self) -> str:
        """Cause and parameters: ``ScaledGelu's backward is wrong: 8 parameters, from blocks.0.conv.weight``."""
        return f"{self.cause}: {self.where}" if self.where else self.cause


def root_findings(rows: Iterable[ResultRow]) -> list[RootFinding]:
    """Return what fails, warns or could not be judged, by root cause, worst first.

    Args:
        rows: an audit's rows; those that pass or were skipped are left out.
    """
    found = [row for row in rows if row.outcome not in (Outcome.PASS, Outcome.SKIPPED)]
    found.sort(key=lambda row: (WORST_FIRST.index(row.counted), row.outcome is not Outcome.FAIL))
    first: dict[tuple[str, str | None], _Key] = {}
    for row in found:
        first.setdefault((row.check, row.phase), _key(row))
    groups: dict[_Key, list[ResultRow]] = {}
    for row in found:
        groups.setdefault(_followed(row, first), []).append(row)
    for key, group in groups.items():
        group.sort(key=lambda row: _key(row) != key)  # what a failure follows from stands for it
    return [RootFinding(_told(group), tuple(group)) for group in groups.values()]


_Key = tuple[object, ...]


def _key(row: ResultRow) -> _Key:
    """What makes two rows one finding: a place at fault; else outcome, check, phase and cause. Never two waivers."""
    cause, place = Cause.read(row.cause)
    shared = (str(row.counted), row.waiver)
    if cause is Cause.WRONG_BACKWARD:  # whether it fails a parameter or warns of the batch's gradient
        return (row.waiver, cause, _function(place))
    if cause in _TOLD_BY_PLACE:
        return (row.waiver, cause, place)
    if cause is not None:
        return (*shared, row.check, row.phase, cause)
    if row.parameter is None and row.cause is None:
        return (*shared, row.check, row.phase, row.message)
    return (*shared, row.check, row.phase, _rounded(row.cause))


def _followed(row: ResultRow, first: dict[tuple[str, str | None], _Key]) -> _Key:
    """The finding that a row belongs to: its own, or that of the check whose failure it follows from."""
    own = _key(row)
    if (row.counted is Outcome.FAIL and row.cause is None) or row.check == "optimizer.probe":
        for check in _FOLLOWS.get(row.check, ()):
            for key in (first.get((check, row.phase)), first.get((check, None))):
                if key is not None and key[:2] == own[:2]:
                    return key
        if row.check == "registration.coverage" and "stale" in row.message:
            return next((key for (check, _), key in first.items() if check == "registration.stale"), own)
    return own


def _told(rows: Sequence[ResultRow]) -> str:
    """What is wrong, the cause first."""
    row = rows[0]
    cause, place = Cause.read(row.cause)
    if cause is Cause.WRONG_BACKWARD:
        return f"{_function(place)}'s backward is wrong"
    if cause is not None and cause in _TOLD_BY_PLACE:
        return _TOLD_BY_PLACE[cause].format(place)
    unmet = CHECKS[row.check].unmet if row.check in CHECKS else row.check
    if row.outcome is Outcome.INCONCLUSIVE:
        if len(rows) == 1 and row.message:
            return _first_sentence(row.message)
        return f"{row.check} could not be judged{f' ({row.cause})' if row.cause else ''}"
    if cause is Cause.ENVIRONMENT:
        return f"{unmet} (this environment's code, not the model's)"
    return unmet if row.cause is None or cause is not None else f"{unmet}: {row.cause}"


def _function(place: str) -> str:
    """The Function of ``Function in Module (path)``."""
    return place.partition(" in ")[0]


def _first_sentence(message: str) -> str:
    """The message's first sentence on one line, without advice."""
    return re.split(r"\. (?=[A-Z])", " ".join(message.split()), maxsplit=1)[0].rstrip(".")


def _rounded(cause: str | None) -> str | None:
    """A cause's text with its numbers to three digits: what differs in the last ones is one cause."""
    return cause and _NUMBER.sub(lambda found: f"{float(found[0]):.3g}", cause)


def in_one_line(findings: Sequence[RootFinding], limit: int = 3) -> str:
    """Return the findings in one line, each with its checks in brackets, the first few in full.

    Args:
        findings: what to tell, most important first.
        limit: how many stand in full.
    """
    texts = [
        f"{one.text} ({', '.join([*one.checks, *(['waived'] if one.waived else [])])})" for one in findings[:limit]
    ]
    hidden = len(findings) - limit
    if hidden > 0:
        texts.append(f"and {plural(hidden, 'more finding')}")
    return "; ".join(texts)
