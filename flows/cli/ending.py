"""The end of a command by a signal: what was begun is cleaned up, one line says what was done, no lines of crashes."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

#: What ends a command; Python itself turns only the first into an exception, and the others would leave files behind.
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StoppedBySignal(BaseException):
    """A signal ended the command; no `KeyboardInterrupt`, of which libraries make endings of their own.

    Attributes:
        number: which one.
        told: what was done and what is left, as far as somebody knows.
    """

    def __init__(self, number: int, told: str = "") -> None:
        super().__init__(told)
        self.number, self.told = number, told


@contextlib.contextmanager
def ended_by_exception() -> Iterator[None]:
    """Let signals raise `StoppedBySignal` in the block, once: cleaning up is not interrupted by a second one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in ENDING}
    for number, handler in before.items():
        if handler not in (signal.SIG_IGN, None):  # nohup stays nohup
            signal.signal(number, _end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> None:
    for each in ENDING:
        signal.signal(each, signal.SIG_IGN)
    logging.disable(logging.CRITICAL)  # everything that is under way now fails, and says so
    raise StoppedBySignal(number)


def exit_as_ended(number: int) -> None:
    """End this process as the signal would have: whoever waits for it sees which one it was."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
