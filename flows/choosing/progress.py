"""How a sweep tells a terminal what it is doing. Flows call the current listener; the default one says nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flows.choosing.audit_summary import AuditSummary


class Listener:
    """Receives a sweep's progress; override what is of interest."""

    def planned(self, total: int) -> None:
        """So many versions will be audited."""

    def stage(self, label: str, stage: str) -> None:
        """The version ``label`` enters a stage: downloading, auditing, publishing."""

    def finished(self, summary: AuditSummary) -> None:
        """One version is done."""

    def set_aside(self, label: str, why: str) -> None:
        """The version ``label`` turned out to be outside the audit."""

    def ended(self, result: dict[str, Any]) -> None:
        """The sweep is done, with this result, whatever state its flow ends in."""


_current: ContextVar[Listener | None] = ContextVar("gradaudit_listener", default=None)


def listener() -> Listener:
    """Return the listener of this context."""
    return _current.get() or Listener()


@contextlib.contextmanager
def listening(chosen: Listener) -> Iterator[None]:
    """Make ``chosen`` the listener inside the block."""
    token = _current.set(chosen)
    try:
        yield
    finally:
        _current.reset(token)
