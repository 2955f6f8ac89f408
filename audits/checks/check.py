"""What a check is: its claim, its thresholds as numbers with their sources, what it cannot see, where to look."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from audits.outcomes import Family, Severity

if TYPE_CHECKING:
    from audits.settings import AuditSettings


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """One number that a check compares with. The code that judges reads it here.

    Attributes:
        value: the number; of a setting, its default.
        unit: of what it is a multiple: ``eps``, ``of the update's norm``; empty for a plain ratio.
        of: what it bounds, where a check has several: ``L2, float32``.
        source: its derivation, or the measurement it comes from.
        setting: the field of `audits.settings.AuditSettings` that a team sets it with.
    """

    value: float
    unit: str = ""
    of: str = ""
    source: str = ""
    setting: str = ""

    def in_force(self, settings: AuditSettings | None = None) -> float:
        """Return the number under some settings, its default without."""
        return float(getattr(settings, self.setting)) if settings is not None and self.setting else self.value

    def text(self, settings: AuditSettings | None = None) -> str:
        """Return the number with its unit and what it bounds: ``4 eps (L2, float32)``."""
        value = f"{self.in_force(settings):,.10g}"
        return f"{value}{f' {self.unit}' if self.unit else ''}{f' ({self.of})' if self.of else ''}"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One claim with a stable name. A name never changes its meaning and a retired one is never used again.

    Attributes:
        name: ``family.claim``.
        claim: what holds when it passes, one sentence.
        unmet: what is wrong when it does not hold, a clause: "frozen parameters move".
        severity: what an unmet claim does to the version.
        formula: the formula of ``error``, in plain text.
        bound: what the error is held against, where that is no plain number: a formula, equality.
        thresholds: the numbers it compares with.
        blind_to: what it cannot see.
        where_to_look: advice for a person who meets a failure.
    """

    name: str
    claim: str
    unmet: str
    severity: Severity = Severity.FAIL
    formula: str = ""
    bound: str = ""
    thresholds: tuple[Threshold, ...] = ()
    blind_to: str = ""
    where_to_look: str = ""
    family: Family = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "family", Family(self.name.partition(".")[0]))

    def threshold(self, settings: AuditSettings | None = None) -> str:
        """Return what the error is held against, in words, as it is in force.

        Args:
            settings: of the audit; the defaults when None.
        """
        numbers = ", ".join(one.text(settings) for one in self.thresholds)
        if self.bound.startswith("times "):
            return f"{numbers} {self.bound}"
        return "; ".join(part for part in (self.bound, numbers) if part)

    def sources(self) -> tuple[str, ...]:
        """Return where its numbers come from, a sentence each."""
        return tuple(f"{one.text()}: {one.source}" for one in self.thresholds if one.source)

    def explanation(self, settings: AuditSettings | None = None) -> list[tuple[str, str]]:
        """Return everything about the check for a reader, as (title, text); a title left empty goes on with the last.

        Args:
            settings: of the audit; the defaults when None.
        """
        lines = (
            ("claim", self.claim),
            ("severity", str(self.severity)),
            ("formula", self.formula),
            ("threshold", self.threshold(settings)),
            *(("from" if number == 0 else "", text) for number, text in enumerate(self.sources())),
            ("blind to", self.blind_to),
            ("where to look", self.where_to_look),
        )
        return [(title, text) for title, text in lines if text]

    def to_dict(self, settings: AuditSettings | None = None) -> dict[str, Any]:
        """Return everything about the check as plain values, its thresholds as they are in force."""
        return {
            "name": self.name,
            "claim": self.claim,
            "unmet": self.unmet,
            "severity": str(self.severity),
            "formula": self.formula,
            "threshold": self.threshold(settings),
            "thresholds": [
                {"value": one.in_force(settings), "unit": one.unit, "of": one.of, "source": one.source,
                 "setting": one.setting or None}
                for one in self.thresholds
            ],
            "blind_to": self.blind_to,
            "where_to_look": self.where_to_look,
        }  # fmt: skip
