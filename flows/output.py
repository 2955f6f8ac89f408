"""stdout carries a command's result and nothing else; libraries print too: MLflow's clients say where a run is."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TextIO, TypeVar, cast

from rich.console import Console

_Parameters = ParamSpec("_Parameters")
_Returned = TypeVar("_Returned")

#: The streams that stdout was, innermost last, while it is kept for results.
_kept: list[TextIO] = []


class _Results(io.TextIOBase):
    """What stdout is for whoever prints results: itself, also while everybody else's prints go to stderr."""

    def write(self, text: str) -> int:
        """Write a part of the result."""
        return _stream().write(text)

    def flush(self) -> None:
        """Bring what was written to its reader."""
        _stream().flush()

    def isatty(self) -> bool:
        """Whether a person looks at it."""
        return _stream().isatty()

    def fileno(self) -> int:
        """Return its descriptor."""
        return _stream().fileno()

    def writable(self) -> bool:
        """Results are written."""
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Return the encoding of stdout."""
        return _stream().encoding or "utf-8"


RESULTS = cast("TextIO", _Results())


def print_json(value: Any, **options: Any) -> None:
    """Print a result as one JSON document."""
    print(json.dumps(value, **{"indent": 2, **options}), file=RESULTS, flush=True)


def only_results(command: Callable[_Parameters, _Returned]) -> Callable[_Parameters, _Returned]:
    """Return the command with stdout kept for `RESULTS`: what anything else writes there goes to stderr."""

    @functools.wraps(command)
    def run(*arguments: _Parameters.args, **named: _Parameters.kwargs) -> _Returned:
        with kept_for_results():
            return command(*arguments, **named)

    return run


@contextlib.contextmanager
def kept_for_results() -> Iterator[None]:
    """Inside the block, `sys.stdout` is stderr, and so is descriptor 1, which children and C libraries write to."""
    before = sys.stdout
    before.flush()
    with contextlib.ExitStack() as stack:
        _kept.append(stack.enter_context(_moved(before)))
        stack.callback(_kept.pop)
        sys.stdout = sys.stderr
        try:
            yield
        finally:
            _stream().flush()
            sys.stdout = before


@contextlib.contextmanager
def _moved(stdout: TextIO) -> Iterator[TextIO]:
    """Yield stdout under another descriptor while 1 is stderr's; as it is where it is no descriptor 1 (a test's)."""
    try:
        is_first = stdout.fileno() == 1
    except (OSError, ValueError):
        is_first = False
    if not is_first:
        yield stdout
        return
    own = os.dup(1)
    try:
        os.dup2(2, 1)
        with open(own, "w", encoding=stdout.encoding, errors=stdout.errors, closefd=False) as moved:
            yield moved
    finally:
        os.dup2(own, 1)
        os.close(own)


def _stream() -> TextIO:
    return _kept[-1] if _kept else sys.stdout


#: Result and log: stdout is for what was asked for, stderr for everything else.
console = Console(file=RESULTS)
log_console = Console(stderr=True)
