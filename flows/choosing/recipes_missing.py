"""Versions that nobody can judge since nobody says how they are trained: news once, counted from then on."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterable, Sequence

from audits.causes import Cause
from audits.naming import reference_to
from audits.results.committed import CommittedAudit, CommittedAudits
from audits.wording import plural
from registry_models.registry.versions import Version


@dataclasses.dataclass(frozen=True)
class WithoutRecipe:
    """One of them.

    Attributes:
        name: the registered model's name.
        version: the version's number.
        since: when its first audit said so.
    """

    name: str
    version: int
    since: datetime.datetime

    @property
    def uri(self) -> str:
        """``models:/NAME/VERSION``."""
        return reference_to(self.name, self.version)


def known_without_recipe(versions: Iterable[Version], committed: CommittedAudits) -> tuple[WithoutRecipe, ...]:
    """Return the versions whose latest audit could not judge them for want of a recipe."""
    found = []
    for version in versions:
        audits = [a for a in committed.of(version.name, version.version) if _later(a, version)]
        if audits and lacks_recipe(audits[-1]):
            first = committed.without_recipe_since(version.name, version.version) or audits[-1].audited_at
            since = first if first.timestamp() * 1000 >= version.created else audits[-1].audited_at
            found.append(WithoutRecipe(version.name, version.version, since))
    return tuple(found)


def lacks_recipe(audit: CommittedAudit) -> bool:
    """Whether an audit could not judge its version for want of a recipe."""
    return audit.unjudged == Cause.NO_RECIPE


def in_words(known: Sequence[WithoutRecipe]) -> str:
    """Return ``3 versions without a recipe, known since 2026-11-27``."""
    return f"{plural(len(known), 'version')} without a recipe, known since {min(k.since for k in known):%Y-%m-%d}"


def _later(audit: CommittedAudit, version: Version) -> bool:
    """Whether the audit is of this version, and not of an earlier one of its number."""
    return audit.audited_at.timestamp() * 1000 >= version.created
