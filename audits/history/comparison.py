"""Two audits held against each other: which findings are new, fixed, the same, and what the difference can come from.

An audit that could not judge a claim has not fixed it: `Change.UNJUDGED` says that a finding went out of sight, or that
what was judged before is open now.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from audits.outcomes import FINDINGS_FIRST, Outcome, ResultRow
from audits.report import AuditReport


class Change(StrEnum):
    """What became of one claim about one parameter, from one audit to a later one."""

    NEW = "new"  #: holds no longer
    SAME = "same"  #: did not hold before either
    UNJUDGED = "unjudged"  #: could not be judged, or was not judged, this time
    FIXED = "fixed"  #: did not hold, or was open, and holds now
    GONE = "gone"  #: did not hold, of a parameter that the model no longer has


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One claim about one parameter, before and now.

    Attributes:
        check: the check's name.
        parameter: the parameter's name; None for a claim about the whole model or phase.
        change: what became of it.
        before: its outcome then, the worst over phases, steps and lanes; None when nothing was said of it.
        now: its outcome now, likewise.
        message: the sentence of the row that speaks for it: now's, or the earlier one's where it is gone.
        cause: what differs between the audits and can be behind it, most likely first, such as ``recipe (optimizer);
            weights differ too``; empty for what did not change.
    """

    check: str
    parameter: str | None
    change: Change
    before: Outcome | None
    now: Outcome | None
    message: str
    cause: str = ""


@dataclass(frozen=True)
class Comparison:
    """A later audit against an earlier one.

    Attributes:
        before: the earlier audit.
        now: the later one.
        differences: new ones first, then unjudged, same, fixed, gone; the worst first in each.
        causes: cause -> what of it differs; empty when nothing that is recorded does.
    """

    before: AuditReport
    now: AuditReport
    differences: tuple[Difference, ...]
    causes: Mapping[str, tuple[str, ...]]

    def of(self, change: Change, outcome: Outcome | None = None) -> list[Difference]:
        """Return the differences of one kind; with ``outcome`` only those that have it now."""
        return [d for d in self.differences if d.change is change and (outcome is None or d.now is outcome)]

    @property
    def newly_failed(self) -> list[Difference]:
        """What fails now and did not fail before: what a notification is about."""
        return self.of(Change.NEW, Outcome.FAIL)

    @property
    def fixed(self) -> list[Difference]:
        """What failed or warned before and is judged right now."""
        return self.of(Change.FIXED)

    @property
    def unjudged(self) -> list[Difference]:
        """What could not be judged now, though it was before, or was a finding before."""
        return self.of(Change.UNJUDGED)

    @property
    def cause(self) -> str:
        """Everything that differs, in one line."""
        return _phrase(list(self.causes.items())) or NOTHING_DIFFERS


#: Said when two audits differ and nothing that is recorded does.
NOTHING_DIFFERS = "nothing that is recorded differs: an installed library, or chance"

_ORDER = (Change.NEW, Change.UNJUDGED, Change.SAME, Change.FIXED, Change.GONE)
_RANK = {outcome: rank for rank, outcome in enumerate(FINDINGS_FIRST)}

#: Part of an audit -> the cause it belongs to, and the words for it.
_PARTS = {
    "weights": ("weights", ""),
    "files": ("code", "the version's files"),
    "sources": ("code", "its modules"),
    "loss": ("recipe", "loss"),
    "optimizer": ("recipe", "optimizer"),
    "state": ("recipe", "optimizer state"),
    "batch": ("recipe", "batch"),
    "step": ("recipe", "step"),
    "options": ("recipe", "options"),
    "gradaudit": ("environment", "gradaudit"),
}

#: Family of a check -> the parts its claims can depend on, most likely first. A family that is not named may depend on
#: all. Weights decide no claim about which tensors an optimizer holds.
_DEPENDS: dict[str, tuple[str, ...]] = {
    "registration": ("optimizer", "options", "files", "sources", "state"),
    "optimizer": ("optimizer", "state", "options", "files", "sources"),
    "gradient": ("sources", "files", "loss", "options", "batch", "weights"),
    "update": ("optimizer", "step", "state", "options", "loss", "sources", "files", "weights", "batch"),
    "step": ("step", "optimizer", "options", "loss", "sources", "files", "batch", "weights"),
    "health": ("weights", "batch", "loss", "optimizer", "step", "sources", "files", "options", "state"),
}
_ENVIRONMENT = ("torch", "device", "driver")


def compare(before: AuditReport, now: AuditReport) -> Comparison:
    """Hold ``now`` against ``before``, claim by claim.

    Claims are told apart by check and parameter; of several phases, steps and lanes the worst counts. A failed claim
    of severity warn counts as a warning, as it does for the version.

    Args:
        before: an earlier audit of the same version or of another one.
        now: the later audit.
    """
    was, held = _claims(before.rows), _claims(now.rows)
    held_before, hold_now = _holding(before.rows), _holding(now.rows)
    parameters = {row.parameter for row in now.rows}
    causes = changed_parts(before, now)
    found = []
    for key in dict.fromkeys([*held, *was]):
        check, parameter = key
        then, this = was.get(key, held_before.get(check)), held.get(key, hold_now.get(check))
        change = _change(then, this, gone=parameter is not None and parameter not in parameters and len(parameters) > 1)
        if change is None:
            continue
        speaker = this if this is not None and change is not Change.GONE else then
        found.append(
            Difference(
                check=check,
                parameter=parameter,
                change=change,
                before=None if then is None else _outcome(then),
                now=None if this is None else _outcome(this),
                message="" if speaker is None else speaker.message,
                cause="" if change is Change.SAME else _cause(check, causes),
            )
        )
    found.sort(key=lambda d: (_ORDER.index(d.change), _RANK[d.now or d.before or Outcome.SKIPPED]))
    return Comparison(before, now, tuple(found), _grouped(causes))


def changed_parts(before: AuditReport, now: AuditReport) -> list[str]:
    """Return the parts of the audit whose digest differs: weights, files, sources, loss, optimizer, ..., torch, device.

    An audit whose parts were not recorded, or that did not get as far, is told apart by its digests as a whole:
    ``model`` and ``recipe``.
    """
    then, this = before.identity, now.identity
    differing = [p for p in _PARTS if before.parts.get(p) and now.parts.get(p) and before.parts[p] != now.parts[p]]
    if "optimizer" in differing and "state" in differing:
        differing.remove("state")  # what another optimizer leaves behind
    causes = {_PARTS[part][0] for part in differing}
    if then.model_digest != this.model_digest and not (before.parts.get("weights") and now.parts.get("weights")):
        differing.append("model")
    known = before.parts.get("optimizer") and now.parts.get("optimizer")
    if then.recipe_digest != this.recipe_digest and "recipe" not in causes and not known:
        differing.append("recipe")
    if then.settings_digest != this.settings_digest:
        differing.append("settings")
    return differing + [name for name in _ENVIRONMENT if getattr(then, name) != getattr(this, name)]


def _claims(rows: Sequence[ResultRow]) -> dict[tuple[str, str | None], ResultRow]:
    """The row that speaks for each check and parameter: the worst."""
    claims: dict[tuple[str, str | None], ResultRow] = {}
    for row in rows:
        key = (row.check, row.parameter)
        if key not in claims or _RANK[_outcome(row)] < _RANK[_outcome(claims[key])]:
            claims[key] = row
    return claims


def _holding(rows: Sequence[ResultRow]) -> dict[str, ResultRow]:
    """The checks that hold as a whole, with a row that says so: such a check names parameters only where it fails."""
    whole: dict[str, list[ResultRow]] = {}
    for row in rows:
        if row.parameter is None:
            whole.setdefault(row.check, []).append(row)
    return {check: said[0] for check, said in whole.items() if all(row.outcome is Outcome.PASS for row in said)}


def _outcome(row: ResultRow) -> Outcome:
    return row.counted


def _change(then: ResultRow | None, this: ResultRow | None, *, gone: bool) -> Change | None:
    """What became of a claim; None where there is nothing to tell.

    Args:
        then: the row that spoke for it.
        this: the row that speaks for it.
        gone: whether the parameter is no longer there.
    """
    before = None if then is None else _outcome(then)
    now = None if this is None else _outcome(this)
    was_finding = before in (Outcome.FAIL, Outcome.WARN)
    match now:
        case Outcome.FAIL:
            return Change.SAME if before is Outcome.FAIL else Change.NEW
        case Outcome.WARN:
            return Change.SAME if was_finding else Change.NEW
        case Outcome.INCONCLUSIVE:
            return Change.SAME if before is Outcome.INCONCLUSIVE else Change.UNJUDGED
        case Outcome.PASS:
            return Change.FIXED if was_finding or before is Outcome.INCONCLUSIVE else None
        case _:
            if gone:
                return Change.GONE if was_finding else None
            return Change.UNJUDGED if was_finding else None


def _cause(check: str, differing: Sequence[str]) -> str:
    """What can be behind a change of this check's claims; what differs besides is named after it."""
    if not differing:
        return NOTHING_DIFFERS
    order = _DEPENDS.get(check.partition(".")[0])
    if order is None:
        return _phrase(list(_grouped(differing).items()))
    whole = [part for part in differing if part not in _PARTS]
    likely = [part for part in order if part in differing]
    grouped = list(_grouped([*likely, *whole]).items())
    if not grouped:
        return f"{NOTHING_DIFFERS} ({_phrase(list(_grouped(differing).items()))} cannot decide this check)"
    # the first cause is named in full, the others only as what else could be
    first, others = grouped[0], [cause for cause, _ in grouped[1:]]
    return _phrase([first]) + (
        f"; {_list(others)} {'differs' if others == ['code'] else 'differ'} too" if others else ""
    )


def _grouped(parts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    grouped: dict[str, list[str]] = {}
    for part in parts:
        cause, words = _PARTS.get(part, ("", ""))
        if part == "model":
            cause, words = "weights or code", ""
        elif part in _ENVIRONMENT:
            cause, words = "environment", part
        named = grouped.setdefault(cause or part, [])
        if words:
            named.append(words)
    return {cause: tuple(words) for cause, words in grouped.items()}


def _phrase(causes: Sequence[tuple[str, tuple[str, ...]]]) -> str:
    return ", ".join(f"{cause} ({', '.join(words)})" if words else cause for cause, words in causes)


def _list(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def fields_of(difference: Difference) -> dict[str, str | None]:
    """Return the difference as plain values: what ``--json`` prints."""
    plain = dataclasses.asdict(difference)
    return {name: None if value is None else str(value) for name, value in plain.items()}
