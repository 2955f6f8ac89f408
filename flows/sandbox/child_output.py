"""What comes out of a child: what it prints, of which the end is kept, and its answer, which goes into a file."""

from __future__ import annotations

import os
import selectors
import time
from pathlib import Path
from typing import IO

#: How much of what a child prints is kept: its end, where a traceback is.
KEPT_LOG = 4_000

_PART = 1 << 16


class PrintedEnd:
    """What a child prints: its end kept, never written to a disk."""

    def __init__(self, pipe: IO[bytes], limit: int) -> None:
        self.pipe, self._limit, self._kept, self._seen = pipe, limit, b"", 0

    @property
    def excessive(self) -> bool:
        """Whether more came than may."""
        return self._seen > self._limit

    def take(self, part: bytes) -> None:
        """Take what came."""
        self._seen += len(part)
        self._kept = (self._kept + part)[-KEPT_LOG:]

    @property
    def text(self) -> str:
        """The end of it."""
        return self._kept.decode("utf-8", "replace")

    def close(self) -> None:
        """Read no more."""
        self.pipe.close()


class AnswerFile:
    """A child's answer: written into a file as it comes, up to a limit; where there is no file, nowhere."""

    def __init__(self, pipe: IO[bytes], file: Path | None, limit: int) -> None:
        self.pipe, self.limit, self._seen = pipe, limit, 0
        self._path = file
        self._file: IO[bytes] | None = None  # made when something comes

    @property
    def excessive(self) -> bool:
        """Whether more came than may."""
        return self._seen > self.limit

    def take(self, part: bytes) -> None:
        """Take what came."""
        self._seen += len(part)
        if self._path is not None and not self.excessive:
            self._file = self._file or self._path.open("wb")
            self._file.write(part)

    def close(self) -> None:
        """Read no more."""
        self.pipe.close()
        if self._file is not None:
            self._file.close()


class ChildOutput:
    """Both of them, read as they come: a child never waits for its parent."""

    def __init__(self, printed: PrintedEnd, answered: AnswerFile) -> None:
        self.printed, self.answered = printed, answered
        self._selector = selectors.DefaultSelector()
        for end in (printed, answered):
            os.set_blocking(end.pipe.fileno(), False)
            self._selector.register(end.pipe, selectors.EVENT_READ, end)

    @property
    def excessive(self) -> bool:
        """Whether more came of one of them than may."""
        return self.printed.excessive or self.answered.excessive

    def read_for(self, seconds: float) -> bool:
        """Read what comes within ``seconds``; False when the child has closed both ends."""
        deadline = time.monotonic() + seconds
        while self._selector.get_map() and not self.excessive:
            ready = self._selector.select(max(0.0, deadline - time.monotonic()))
            for key, _ in ready:
                part = key.data.pipe.read(_PART)
                if part:
                    key.data.take(part)
                elif part is not None:
                    self._selector.unregister(key.fileobj)
            if not ready or (seconds and time.monotonic() >= deadline):
                break
        return bool(self._selector.get_map())

    def close(self) -> None:
        """Read what is there and no more."""
        self.read_for(0.0)
        self._selector.close()
        self.printed.close()
        self.answered.close()
