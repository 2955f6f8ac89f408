"""The demo's nine versions on the device: in this process, and as users have it, in the sandbox."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

from audits import Outcome
from benchmarks.gpu.running import Bench, Case, Found, LeftOutError, healthy, told

#: Checks that must fail in a version with a planted fault.
PLANTED = {
    "digits-classifier v2": {"gradient.finite-difference"},
    "digits-gan v2": {"update.isolation"},
    "char-gpt v2": {"registration.coverage", "registration.stale"},
    "frozen-features v2": {"registration.requires-grad", "update.frozen"},
}

#: Of `gradient.*` beside a wrong finite difference: the same fault, seen by another oracle.
_SAME_FAULT = ("gradient.", "registration.", "update.isolation", "update.frozen", "update.rule")

#: Least seconds for the nine audits in child processes.
SANDBOX_SECONDS = 90.0


def _version(version: Any, bench: Bench) -> Found:
    trained = version.train()
    report = bench.audit(trained.model, trained.recipe)
    if version.planted is None:
        return healthy(report)
    failed = {row.check for row in report.rows if row.outcome is Outcome.FAIL}
    missed = PLANTED[version.label] - failed
    invented = {check for check in failed - PLANTED[version.label] if not check.startswith(_SAME_FAULT)}
    complaints = [*(f"{check} did not fail" for check in sorted(missed)),
                  *(f"{check} failed as well" for check in sorted(invented))]  # fmt: skip
    if complaints:
        complaints += told(report, [Outcome.FAIL, Outcome.INCONCLUSIVE])
    return Found(tuple(complaints), f"fail as planted: {', '.join(sorted(failed))}")


def _sandboxed(bench: Bench) -> Found:
    if bench.seconds_left < SANDBOX_SECONDS:
        raise LeftOutError(f"less than {SANDBOX_SECONDS:.0f} s are left")
    with tempfile.TemporaryDirectory(prefix="gradaudit-demo-") as folder:
        command = [sys.executable, "-m", "flows.cli", "demo", "--folder", folder, "--json"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}
        limit = max(bench.seconds_left, SANDBOX_SECONDS)
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment, check=False)
    try:
        answer = json.loads(done.stdout[done.stdout.index("{") :])
    except ValueError:
        return Found((f"the demo gave no answer: {done.stderr.strip()[-300:]}",))
    levels = sorted({str(verdict.get("isolation")) for verdict in answer["verdicts"]})
    devices = sorted({str(verdict.get("device")) for verdict in answer["verdicts"]})
    return Found(tuple(answer["surprises"]), f"{len(answer['verdicts'])} versions, {', '.join(levels + devices)}")


def cases(bench: Bench) -> list[Case]:
    try:
        from flows.demo.catalogue import DEMO_VERSIONS
    except ImportError as error:  # what the demo's scripts import at once
        raise LeftOutError(str(error)) from error
    chosen = [v for v in DEMO_VERSIONS if not bench.quick or v.name in ("tutorial-linear", "char-gpt")]
    return [Case("demo", v.label, functools.partial(_version, v), ("sklearn",)) for v in chosen]


def sandbox_cases(bench: Bench) -> list[Case]:
    return [Case("demo", "all nine, each in a child process", _sandboxed, ("sklearn", "mlflow", "prefect"), cuda=True)]
