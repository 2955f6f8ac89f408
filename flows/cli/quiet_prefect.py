"""Prefect's log without what a command says better in one line: tracebacks of known troubles, crashes of an ending."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator

from audits.errors import GradauditError

#: Prefect's loggers of runs.
_LOGGERS = ("prefect.flow_runs", "prefect.task_runs")

#: What Prefect says of runs that a signal ended.
_ENDED = re.compile(r"^(Crash detected!|Finished in state Crashed).*(\bStopped|termination signal|was cancelled)")


class _Plain(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        """Drop what only repeats that the sweep was stopped; keep a known trouble's sentence, not its traceback."""
        if _ENDED.search(record.getMessage()):
            return False
        if record.exc_info and isinstance(record.exc_info[1], GradauditError):
            record.exc_info, record.exc_text = None, None
        return True


@contextlib.contextmanager
def quiet_prefect() -> Iterator[None]:
    """Filter the log inside the block."""
    plain = _Plain()
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(plain)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(plain)
