"""Tests of this folder run on the emulated device, in one process beside each process of pytest.

Torch starts its threads for devices at the first backward of a process, so the device has to be there from the start;
and no other test shall find an accelerator in its process. The process beside runs each test with a pytest of its own,
as pytest here asks for it, and says how it went.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, TextIO

import pytest

#: Set in the process beside.
_BESIDE = "TESTS_BESIDE_ON_EMULATED_DEVICE"

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parents[1]


class _Beside:
    """The process beside, and what it is told: a test's id in, how it went out, each a line of JSON."""

    def __init__(self) -> None:
        environment = {**os.environ, _BESIDE: "1", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from tests.accelerator.conftest import serve; serve()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=_ROOT, env=environment,
        )  # fmt: skip
        atexit.register(self._process.kill)

    def run(self, test: str) -> dict[str, str]:
        """Run one test there; a process that dies over it has failed it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(test) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            _beside.clear()
            return {"outcome": "failed", "text": f"the process on the device ended with code {self._process.wait()}"}
        return dict(json.loads(answer))


_beside: list[_Beside] = []


def serve() -> None:
    """Run tests as they are asked for, until nobody asks any more."""
    from tests.accelerator import register

    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what tests and pytest print is no answer
    register()
    options = [str(_HERE), "-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist"]
    pytest.main(options, [_Server(requests, answers)])
    os._exit(0)


class _Server:
    """A plugin: collects the folder once, and runs what it is asked for instead of everything."""

    def __init__(self, requests: TextIO, answers: TextIO) -> None:
        self._requests, self._answers = requests, answers
        self._outcome, self._text = "failed", ""

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        for line in self._requests:
            self._outcome, self._text = "failed", "it gave no report"
            item = items[json.loads(line)]
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            self._answers.write(json.dumps({"outcome": self._outcome, "text": self._text}) + "\n")
            self._answers.flush()
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            self._outcome, self._text = report.outcome, str(reason or "")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run the test beside, unless this is that process or the test is not one of the device's."""
    if _BESIDE in os.environ or pyfuncitem.get_closest_marker("accelerator") is None:
        return None
    from tests.accelerator import NoCompilerError, built

    try:
        built()
    except NoCompilerError as error:
        pytest.skip(str(error))
    if not _beside:
        _beside.append(_Beside())
    went: Any = _beside[0].run(pyfuncitem.nodeid)
    if went["outcome"] == "skipped":
        pytest.skip(went["text"])
    if went["outcome"] != "passed":
        pytest.fail(went["text"], pytrace=False)
    return True
