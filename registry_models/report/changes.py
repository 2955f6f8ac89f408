"""What changed since the last audited version, as the report and the run's note show it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from audits.history.comparison import Comparison
    from audits.history.reading import EarlierComparisons

#: Changes that a page lists; the others are counted.
LISTED = 400


@dataclass(frozen=True, kw_only=True)
class Change:
    """One finding held against the last audited version.

    Attributes:
        parameter: canonical name; None for a claim about the whole model.
        check: name of the check.
        kind: ``new``, ``unjudged``, ``same``, ``fixed`` or ``gone``; see `audits.history.comparison.Change`.
        turned: its outcome before and now, such as ``pass → fail``.
        cause: what differs between the versions: weights, recipe, code, environment; empty when nothing does.
    """

    parameter: str | None
    check: str
    kind: str
    turned: str = ""
    cause: str = ""


@dataclass(frozen=True, kw_only=True)
class Changes:
    """All changes since one earlier audit.

    Attributes:
        against: the earlier audit, such as ``v1, audited 2026-01-31``.
        cause: everything that differs, in one line.
        counts: how many there are of each kind that occurs.
        listed: the first `LISTED`, new ones first.
    """

    against: str
    cause: str
    counts: tuple[tuple[str, int], ...] = ()
    listed: tuple[Change, ...] = ()

    @property
    def unlisted(self) -> int:
        """How many are not listed."""
        return sum(number for _, number in self.counts) - len(self.listed)


def changes_of(earlier: EarlierComparisons) -> Changes | None:
    """Return the changes since the last audited version; of a first version, since its previous audit; else None."""
    comparison = earlier.version or earlier.audit
    return None if comparison is None else _changes(comparison)


def _changes(comparison: Comparison) -> Changes:
    before = comparison.before.identity
    kinds = [str(difference.change) for difference in comparison.differences]
    return Changes(
        against=f"v{before.model_version}, audited {before.audited_at:%Y-%m-%d}",
        cause=comparison.cause,
        counts=tuple((kind, kinds.count(kind)) for kind in dict.fromkeys(kinds)),
        listed=tuple(
            Change(
                parameter=d.parameter,
                check=d.check,
                kind=str(d.change),
                turned=f"{d.before or 'not judged'} → {d.now or 'not judged'}",
                cause=d.cause,
            )
            for d in comparison.differences[:LISTED]
        ),
    )
