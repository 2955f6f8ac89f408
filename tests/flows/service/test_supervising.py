"""What `gradaudit up` does with its processes: real ones, killed, hung and replaced."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from audits.errors import InfrastructureError
from flows.service.pools import QUEUES
from flows.service.supervising import Service, Supervisor
from flows.service.up import OfflineWorkers
from tests.servers import plan_for, running

#: A worker that spins: deaf to SIGTERM, asks for nothing, and has a flow run under way as its child.
SPINNING = """
import os, pathlib, signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open(sys.argv[1], "a") as out:
    out.write(f"{os.getpid()} {child.pid}\\n")
while True:
    pass
"""


def wait(what: str, holds: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def supervisor(tmp_path: Path, said: list[str]) -> Iterator[Supervisor]:
    with Supervisor(tmp_path / "logs", said.append) as supervisor:
        yield supervisor


@pytest.mark.end_to_end
def test_a_spinning_worker_is_replaced_and_its_run_goes_on(
    tmp_path: Path, supervisor: Supervisor, said: list[str]
) -> None:
    starts = tmp_path / "starts"
    service = Service("worker-a", [sys.executable, "-c", SPINNING, str(starts)], dict(os.environ), patience=0.5)

    def started() -> list[tuple[int, int]]:
        lines = starts.read_text().splitlines() if starts.is_file() else []
        return [(int(line.split()[0]), int(line.split()[1])) for line in lines]

    supervisor.start(service)
    wait("it has started", lambda: len(started()) == 1)
    supervisor.look()
    supervisor.replace("worker-b", "no such worker")
    assert not said

    supervisor.replace("worker-a", "it no longer asks Prefect for work")
    (first, run), *_ = started()
    wait("the spinning process is killed", lambda: not alive(first))

    def second_start() -> bool:
        supervisor.look()
        return len(started()) == 2

    wait("it is started again", second_start)
    assert said[0] == "worker-a: it no longer asks Prefect for work"
    assert said[1].startswith("worker-a ended (SIGKILL), started again in 1 s; its log: ")
    assert len(said) == 2
    assert alive(run), "what the worker had started goes on"

    supervisor.look()
    supervisor.stop()
    assert not [pid for start in started() for pid in start if alive(pid)], "and ends with `gradaudit up`"


@pytest.mark.end_to_end
def test_what_ends_at_once_is_refused_with_its_last_words(tmp_path: Path, supervisor: Supervisor) -> None:
    service = Service("mlflow", [sys.executable, "-c", "raise SystemExit('no such database')"], dict(os.environ))
    supervisor.start(service)
    with pytest.raises(InfrastructureError, match=r"mlflow ended at once: no such database .*mlflow\.log"):
        supervisor.wait_for(service, lambda: False, 30, lambda: False)


@pytest.mark.end_to_end
def test_what_ends_again_and_again_is_started_ever_more_rarely(
    tmp_path: Path, supervisor: Supervisor, said: list[str]
) -> None:
    supervisor.start(Service("webhook", [sys.executable, "-c", "raise SystemExit(3)"], dict(os.environ)))

    def three() -> bool:
        supervisor.look()
        return len(said) == 3

    wait("three ends are told", three)
    assert [line.split(";")[0] for line in said] == [
        f"webhook ended (exit code 3), started again in {delay} s" for delay in (1, 2, 4)
    ]


@pytest.mark.exhaustive
@pytest.mark.end_to_end
def test_a_worker_that_asks_for_no_work_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real worker, stopped by a signal: to Prefect's server it looks as the spinning one does."""
    monkeypatch.setattr(OfflineWorkers, "EVERY", 2.0)
    monkeypatch.setenv("PREFECT_WORKER_HEARTBEAT_SECONDS", "1")
    plan = plan_for(tmp_path)
    stalled, well = plan.workers()[1:]  # the pool of the first is missing: it must not hide the others'
    # Prefect's own rhythm, by which it shows a worker as offline, is some 15 s
    server = plan.prefect()
    server = Service(
        server.name, server.command, {**server.environment, "PREFECT_SERVER_SERVICES_FOREMAN_LOOP_SECONDS": "1"}
    )
    with running(server, plan, f"{plan.prefect_url}/api/health"):
        offline = OfflineWorkers(f"{plan.prefect_url}/api")
        with running(stalled, plan) as process, running(well, plan):
            names = {"audits", "registration"}
            wait("both are online", lambda: _online(plan.prefect_url) == names, 90)
            deadline = time.monotonic() + 8
            while time.monotonic() < deadline:
                assert offline.look() == set(), "both ask for work"
                time.sleep(0.2)
            process.send_signal(signal.SIGSTOP)
            found: list[set[str]] = []

            def noticed() -> bool:
                found.append(offline.look())
                return bool(found[-1])

            wait("the silent one is noticed", noticed, 60)
            assert found[-1] == {"audits"}
            assert offline.look() == set(), "once: the fresh one gets its time"
            process.kill()


def _online(url: str) -> set[str]:
    answers = [httpx.post(f"{url}/api/work_pools/{pool}/workers/filter", json={}, timeout=30) for pool in QUEUES]
    return {w["name"] for found in answers if found.is_success for w in found.json() if w["status"] == "ONLINE"}
