"""What changed since the last audited version, as the report shows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Change:
    """One finding held against the last audited version.

    Attributes:
        parameter: canonical name; None for a claim about the whole model.
        check: name of the check.
        kind: ``new`` (failed only now), ``fixed`` (failed only then) or ``same`` (failed both times).
        cause: what differs between the versions: weights, recipe, code, environment; empty when nothing does.
    """

    parameter: str | None
    check: str
    kind: Literal["new", "fixed", "same"]
    cause: str = ""
