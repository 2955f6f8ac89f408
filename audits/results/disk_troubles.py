"""What keeps a disk from its work, where repeating does not help: no room, no right, read-only."""

from __future__ import annotations

import errno
import re
import tempfile
from collections.abc import Iterator

from audits.errors import DiskError

#: How errors of the disk read once a library has put them into a text.
_NUMBER = re.compile(r"(?:\[Errno (\d+)\]|\bOSError\((\d+),)|\[errno (\d+)\]|errno: (\d+)")

_READ_ONLY = re.compile(r"readonly database|Read-only file system", re.IGNORECASE)


def disk_trouble(error: BaseException, what: str, place: str = "") -> DiskError | None:
    """Return the error that names the place and the cure; None where it is not the disk, or may help to repeat.

    Args:
        error: what was raised; what it came from is looked at too.
        what: what was being done.
        place: the file or folder, where the error itself does not name it.
    """
    chain = list(chain_of(error))
    text = " ".join(map(str, chain))
    named = next((str(e.filename) for e in chain if isinstance(e, OSError) and e.filename), place)
    found = {e.errno for e in chain if isinstance(e, OSError)}
    found |= {int(number) for groups in _NUMBER.findall(text) for number in groups if number}
    if found.intersection((errno.ENOSPC, errno.EDQUOT)):
        return DiskError(
            f"{what}: no space is left on the disk of {named or tempfile.gettempdir()}: free some, or "
            + ("name a folder that has more" if place else "set TMPDIR to a folder that has more")
        )
    if errno.EROFS in found or _READ_ONLY.search(text):
        return DiskError(f"{what}: {named or 'the database'} is read-only here: name another, or make it writable")
    if found.intersection((errno.EACCES, errno.EPERM)):
        return DiskError(f"{what}: this user may not use {named or 'the folder'}: name another, or change its rights")
    if found.intersection((errno.ENOTDIR, errno.EEXIST)):
        return DiskError(f"{what}: a file stands where a folder must be, in {named or 'its path'}: name another folder")
    return None


def chain_of(error: BaseException | None) -> Iterator[BaseException]:
    """Return the error and what it came from, last cause last."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__
