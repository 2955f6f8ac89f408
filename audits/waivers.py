"""Waivers: a finding that somebody answers for, until a day. Reads no file and no clock: callers do.

A waived finding stays a finding and is shown as waived; it warns where it would have failed its version. Nothing that
could not be judged can be waived, coverage least of all; a waiver of `audit.completed` excuses a night's exit code.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from packaging.specifiers import InvalidSpecifier, SpecifierSet

from audits.checks.version import AUDIT_COMPLETED
from audits.errors import SettingsError, suggest, unknown_among
from audits.globs import matches, matching
from audits.outcomes import Outcome, ResultRow
from audits.report import AuditReport
from audits.short_digests import short_digest

_REQUIRED = ("model", "check", "reason", "owner", "expires")


@dataclass(frozen=True, kw_only=True)
class Waiver:
    """One agreed exception.

    Attributes:
        model: glob of registered models' names.
        check: glob of checks' names.
        reason: why the finding is accepted.
        owner: who answers for it.
        expires: the last day, UTC, on which it holds.
        versions: a range such as ``>=3,<7``, or one number; empty for all.
        parameter: glob of parameters' names; ``*`` also takes claims about the whole model.
    """

    model: str
    check: str
    reason: str
    owner: str
    expires: datetime.date
    versions: str = ""
    parameter: str = "*"

    def __post_init__(self) -> None:
        _ = self._range  # refuses what is no range

    @cached_property
    def _range(self) -> SpecifierSet:
        text = self.versions.strip()
        try:
            return SpecifierSet(f"=={text}" if text.isdigit() else text)
        except InvalidSpecifier as error:
            raise SettingsError(
                f"versions {self.versions!r} is not a range of versions; write one number, or for example '>=3,<7'"
            ) from error

    @cached_property
    def id(self) -> str:
        """A short digest of everything in it."""
        plain = json.dumps(dataclasses.asdict(self), sort_keys=True, default=str)
        return short_digest(plain, 12)

    @property
    def text(self) -> str:
        """Reason, owner and end, for a person."""
        return f"{self.reason} ({self.owner}, until {self.expires.isoformat()})"

    @property
    def label(self) -> str:
        """What it is about, for a person."""
        versions = f" {self.versions}" if self.versions else ""
        parameter = f" of {self.parameter}" if self.parameter != "*" else ""
        return f"{self.check}{parameter} in {self.model}{versions}"

    def covers(self, model: str, version: int) -> bool:
        """Whether it is about this version."""
        return matches(model, self.model) and self._range.contains(str(version))

    def holds(self, today: datetime.date) -> bool:
        """Whether it is still in force on this day."""
        return today <= self.expires

    def matches(self, row: ResultRow) -> bool:
        """Whether it is about this finding; only failures and warnings can be waived."""
        if row.outcome not in (Outcome.FAIL, Outcome.WARN) or not matches(row.check, self.check):
            return False
        return self.parameter == "*" or (row.parameter is not None and matches(row.parameter, self.parameter))


def waived(report: AuditReport, waivers: Sequence[Waiver], today: datetime.date) -> AuditReport:
    """Return the report with its waived findings marked, and those named whose waiver has expired.

    Args:
        report: the audit of a registered version; marks that are in it already count for nothing.
        waivers: all there are.
        today: the present day, UTC.
    """
    identity = report.identity
    mine = [w for w in waivers if w.covers(identity.model_name, identity.model_version or 0)]
    used: dict[str, None] = {}
    rows = []
    for row in report.rows:
        matching = [waiver for waiver in mine if waiver.matches(row)]
        holding = [waiver for waiver in matching if waiver.holds(today)]
        used |= dict.fromkeys(waiver.id for waiver in holding)
        message = row.message
        if matching and not holding:
            last = max(matching, key=lambda waiver: waiver.expires)
            expired = f"Its waiver by {last.owner} ({last.reason}) expired on {last.expires.isoformat()}."
            message = f"{message.rstrip('. ')}. {expired}" if message else expired
        waiver = holding[0].text if holding else None
        changed = row.waiver != waiver or row.message != message
        rows.append(dataclasses.replace(row, waiver=waiver, message=message) if changed else row)
    return dataclasses.replace(report, rows=tuple(rows), waivers=tuple(used))


def excuses(waivers: Iterable[Waiver], model: str, version: int, today: datetime.date) -> list[Waiver]:
    """Return the waivers in force by which a version that could not be judged does not change a night's exit code.

    Its outcome stays inconclusive: somebody answers, until a day, for the fact that it is.
    """
    return [
        w for w in waivers if w.covers(model, version) and w.holds(today) and matches(AUDIT_COMPLETED.name, w.check)
    ]


def standing(waivers: Iterable[Waiver], model: str, version: int, today: datetime.date) -> str:
    """Return a digest of the waivers about a version and of which of them hold; empty where there is none.

    A part of what makes a version due: a waiver that came, changed, went or expired has it audited again.
    """
    mine = sorted(f"{w.id} {w.holds(today)}" for w in waivers if w.covers(model, version))
    return short_digest("\n".join(mine)) if mine else ""


def unmatched(
    waivers: Iterable[Waiver], audits: Iterable[tuple[str, int, Sequence[str]]], today: datetime.date
) -> list[Waiver]:
    """Return the waivers in force that are about an audited version and excuse nothing in any.

    Args:
        waivers: all there are.
        audits: model, version and used waivers' ids of every version's latest audit.
        today: the present day, UTC.
    """
    audits = list(audits)
    used = {waiver_id for _, _, ids in audits for waiver_id in ids}
    return [
        waiver
        for waiver in waivers
        if waiver.holds(today)
        and waiver.id not in used
        and any(waiver.covers(model, version) for model, version, _ in audits)
    ]


def waivers_from_plain(plain: Any, *, source: str) -> tuple[Waiver, ...]:
    """Build the waivers of a file: a mapping with the one key ``waivers``, a list of mappings.

    Args:
        plain: what the YAML says.
        source: the file, for messages.

    Raises:
        SettingsError: an unknown or missing key, a value that cannot be; the text names the entry.
    """
    if plain is None:
        return ()
    if not isinstance(plain, Mapping) or set(plain) != {"waivers"} or not isinstance(plain["waivers"] or [], list):
        raise SettingsError(f"{source} must have the one key 'waivers' with a list under it")
    return tuple(_waiver(entry, f"{source}, waiver {n}") for n, entry in enumerate(plain["waivers"] or [], 1))


def _waiver(entry: Any, place: str) -> Waiver:
    from audits.checks import CHECKS

    known = [field.name for field in dataclasses.fields(Waiver)]
    if not isinstance(entry, Mapping):
        raise SettingsError(f"{place} must be a mapping with {', '.join(known)}")
    if unknown := unknown_among(entry, known):
        raise SettingsError(f"{place}: unknown key {unknown}")
    missing = [name for name in _REQUIRED if entry.get(name) in (None, "")]
    if missing:
        raise SettingsError(f"{place} lacks {', '.join(missing)}")
    values: dict[str, Any] = {name: str(value).strip() for name, value in entry.items() if value is not None}
    if not matching(CHECKS, values["check"]):
        raise SettingsError(f"{place}: there is no check {values['check']!r}{suggest(values['check'], CHECKS)}")
    try:
        values["expires"] = datetime.date.fromisoformat(values["expires"])
    except ValueError as error:
        raise SettingsError(f"{place}: expires must be a day such as 2027-01-31, not {entry['expires']!r}") from error
    try:
        return Waiver(**values)
    except SettingsError as error:
        raise SettingsError(f"{place}: {error}") from error
