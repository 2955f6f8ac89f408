"""Child processes that do not outlive their parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


#: Looked up before any fork: between fork and exec nothing may be imported.
_LIBC = _libc()


def die_with_parent(parent: int) -> None:
    """In a child, between fork and exec: be killed when the parent is, even by SIGKILL (Linux only).

    Args:
        parent: the parent's process id as it knows itself, to notice a parent that is already gone.
    """
    if _LIBC is None:
        return
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
