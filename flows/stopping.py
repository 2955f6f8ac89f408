"""What ends an audit whose sweep was stopped; apart from the sweep, so that a sandbox comes without it."""

from __future__ import annotations


class Stopped(BaseException):
    """The sweep was stopped while this audit waited or ran; no `Exception`, so that nothing turns it into a result."""
