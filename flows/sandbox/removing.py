"""Removing folders that a stranger's code wrote into: no link in them leads out, no depth or mode is in the way.

Python's own removers call themselves for every level (3,000 folders end them), and one of them changes the mode of what
it cannot remove through a path, which a link may lead anywhere. Here a folder that holds folders is first emptied by
moving these up, so that none is deeper than one level; every name is looked up in a folder that is held open.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import stat
from pathlib import Path

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove_tree(folder: Path) -> bool:
    """Remove a folder with all it holds; never raises.

    Returns:
        Whether nothing of it is left.
    """
    try:
        top = _open(str(folder), None)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    own, numbers = secrets.token_hex(8), itertools.count()
    try:
        waiting = _folders_in(top)
        while waiting:
            name = waiting.pop()
            place = _open(name, top)
            try:
                for inner in _folders_in(place):
                    os.close(_open(inner, place))  # makes it one that can be moved
                    moved = f"{own}-{next(numbers)}"
                    os.rename(inner, moved, src_dir_fd=place, dst_dir_fd=top)
                    waiting.append(moved)
            finally:
                os.close(place)
            os.rmdir(name, dir_fd=top)
    except OSError:
        return False
    finally:
        os.close(top)
    with contextlib.suppress(OSError):
        os.rmdir(folder)
    return not os.path.lexists(folder)


def _folders_in(place: int) -> list[str]:
    """Remove what is no folder and return the names of the folders."""
    with os.scandir(place) as found:
        entries = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in found]
    for name, is_folder in entries:
        if not is_folder:
            os.unlink(name, dir_fd=place)
    return [name for name, is_folder in entries if is_folder]


def _open(name: str, above: int | None) -> int:
    """Open a folder, made one that its owner may read and write; never through a link."""
    handle = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above) if hasattr(os, "O_PATH") else None
    if handle is None:
        return os.open(name, _FOLDER, dir_fd=above)
    try:
        mode = os.fstat(handle).st_mode
        if stat.S_ISDIR(mode) and mode & 0o700 != 0o700:
            with contextlib.suppress(OSError):
                os.chmod(f"/proc/self/fd/{handle}", 0o700)  # the folder itself: a handle on a link is no folder
        return os.open(name, _FOLDER, dir_fd=above)
    finally:
        os.close(handle)
