"""Private folders of audits: whole models lie in them. One that a killed process left behind is removed by the next.

A folder is held by a lock on a file in it for as long as its process lives; the kernel lets go of it however that ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from flows.sandbox.removing import remove_tree

_PREFIX, _HELD = "gradaudit-audit-", ".held"

#: How often and in what pauses (seconds) removing is tried; what is left then is `remove_stale`'s.
_TRIES, _PAUSE = 100, 0.02


@contextlib.contextmanager
def private_folder() -> Iterator[str]:
    """Make a fresh folder that only this user can read, and remove it at the end."""
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    try:
        making = folder / f"{_HELD}.new"
        with making.open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            making.rename(folder / _HELD)  # it is never there without its lock
            yield str(folder)
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a folder, into which the threads of a download that was cut short still write for a moment."""
    for _ in range(_TRIES):
        if remove_tree(folder):
            return
        time.sleep(_PAUSE)


def remove_stale() -> int:
    """Remove this user's private folders whose process is gone; return how many there were."""
    removed = 0
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            with (folder / _HELD).open("r+") as held:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # an OSError while its process lives
                removed += remove_tree(folder)
    return removed
