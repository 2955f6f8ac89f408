"""Real servers for tests, each a process of its own on a free port of 127.0.0.1, ended with everything it started.

plan = plan_for(tmp_path)
with running(plan.mlflow(), plan, f"{plan.mlflow_url}/health"), running(plan.prefect(), plan, ...):
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from flows.processes import die_with_parent
from flows.sandbox.process_tree import ProcessTree
from flows.service.plan import HOST, Plan
from flows.service.supervising import Service

#: Seconds a server may take until it answers: some 10 are usual, a loaded machine takes longer.
STARTUP_SECONDS = 180.0


def plan_for(folder: Path) -> Plan:
    """Return the processes of one installation on the CPU: free ports, everything it keeps in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        ports = []
        for _ in range(3):
            probe = held.enter_context(socket.socket())
            probe.bind((HOST, 0))
            ports.append(int(probe.getsockname()[1]))
    inherited = {**os.environ, "GRADAUDIT_STATE": str(folder / "state")}
    return Plan(folder, *ports, (), inherited)


@contextlib.contextmanager
def running(service: Service, plan: Plan, url: str | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """Start one process, wait until ``url`` answers, and end it with everything it started; its log is ``log_of``."""
    parent = os.getpid()
    with log_of(service, plan).open("ab") as log:
        process = subprocess.Popen(
            list(service.command),
            env=dict(service.environment),
            cwd=plan.folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=lambda: die_with_parent(parent),
        )
    tree = ProcessTree(process.pid)
    try:
        if url is not None:
            wait_for(url, process, service, plan)
        yield process
    finally:
        tree.look()
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(service.patience)
        tree.end()
        process.wait()


@contextlib.contextmanager
def mlflow_server(plan: Plan) -> Iterator[str]:
    """MLflow's REST server; yield its tracking URI."""
    with running(plan.mlflow(), plan, f"{plan.mlflow_url}/health"):
        yield plan.mlflow_url


@contextlib.contextmanager
def prefect_server(plan: Plan) -> Iterator[str]:
    """Prefect's server with its services; yield its API's URL."""
    with running(plan.prefect(), plan, f"{plan.prefect_url}/api/health"):
        yield f"{plan.prefect_url}/api"


def log_of(service: Service, plan: Plan) -> Path:
    """Return the file that a service writes to."""
    return plan.folder / f"{service.name}.log"


def wait_for(url: str, process: subprocess.Popen[bytes], service: Service, plan: Plan) -> None:
    """Wait until a server speaks HTTP, whatever it thinks of the other services."""
    deadline = time.monotonic() + STARTUP_SECONDS
    while True:
        words = log_of(service, plan).read_text(errors="replace")[-3000:]
        assert process.poll() is None, f"{service.name} ended: {words}"
        assert time.monotonic() < deadline, f"{service.name} does not answer: {words}"
        with contextlib.suppress(OSError):
            try:
                with urllib.request.urlopen(url, timeout=5):
                    return
            except urllib.error.HTTPError:
                return
        time.sleep(0.1)
