"""Child processes: they do not outlive their parent, and import nothing from where they happen to be started."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1

#: This interpreter, for ``-m``: without what lies in the working directory, a user's own ``flows`` folder above all.
PYTHON = (sys.executable, "-P")

#: And uvicorn, which puts the working directory on the path by itself unless it is told another one.
UVICORN = (*PYTHON, "-m", "uvicorn", "--app-dir", str(Path(__file__).resolve().parent.parent), "--factory")


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
