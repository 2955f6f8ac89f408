"""``gradaudit up``: MLflow, Prefect, workers and the webhook on this machine, until one Ctrl-C ends them all."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import filelock

from audits.errors import InfrastructureError, SettingsError
from flows.output import console, log_console
from flows.processes import PYTHON
from flows.service.plan import HOST, Plan
from flows.service.pools import QUEUES
from flows.service.supervising import Supervisor

#: Seconds a server may take until it answers: some 10 are usual, its first start with an empty database the longest.
STARTUP_SECONDS = 180.0


@dataclass(frozen=True)
class UpOptions:
    """What a person may choose.

    Attributes:
        folder: everything that is kept: databases, artifacts, results, logs, secrets.
        mlflow_port: of MLflow's server and UI; 0: any free one.
        prefect_port: of Prefect's server and UI; 0: any free one.
        webhook_port: of the webhook; 0: any free one.
        gpus: ``all``, ``none``, or numbers such as ``0,1``: one worker each.
    """

    folder: Path
    mlflow_port: int = 5000
    prefect_port: int = 4200
    webhook_port: int = 8765
    gpus: str = "all"


def run_up(options: UpOptions, environment: Mapping[str, str]) -> int:
    """Start everything, print where it is, look after it until SIGINT or SIGTERM, end it.

    Raises:
        SettingsError: a port is taken, the folder is in use, or a GPU is not there; nothing has been started.
        InfrastructureError: a server did not start; nothing is left running.
    """
    began = time.monotonic()
    gpus = visible_gpus(options.gpus)
    folder = options.folder.absolute()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / "up.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise SettingsError(f"--folder: another `gradaudit up` is running in {folder}") from error
    with lock:
        mlflow_port, prefect_port, webhook_port = free_ports(options)
        plan = Plan(folder, mlflow_port, prefect_port, webhook_port, gpus, environment)
        stop = _stop_signal()
        with Supervisor(
            folder / "logs", lambda text: log_console.print(text, markup=False, soft_wrap=True)
        ) as supervisor:
            with log_console.status("starting MLflow and Prefect"):
                _start(supervisor, plan, stop)
            if not stop.is_set():
                console.print(_places(plan, time.monotonic() - began), markup=False, highlight=False, soft_wrap=True)
            offline = OfflineWorkers(f"{plan.prefect_url}/api")
            while not stop.wait(0.5):
                supervisor.look()
                for worker in offline.look():
                    supervisor.replace(f"worker-{worker}", "it no longer asks Prefect for work")
            log_console.print("stopping ...")
    log_console.print("stopped: nothing is left running, the data is kept")
    return 0


class OfflineWorkers:
    """Notices workers that live and ask for no work: Prefect's can spin for ever once its server has been away.

    Args:
        api: Prefect's API.
    """

    #: Seconds between two looks. A worker beats every 30 s and counts as offline after 90; all look so when the server
    #: comes back, hence it takes two looks.
    EVERY = 45.0

    def __init__(self, api: str) -> None:
        self._api, self._looked = api, time.monotonic()
        self._offline: set[str] = set()

    def look(self) -> set[str]:
        """Return the workers that were offline at this look and at the one before it."""
        if time.monotonic() - self._looked < self.EVERY:
            return set()
        self._looked = time.monotonic()
        before, workers = self._offline, []
        for pool in QUEUES:
            # one pool that somebody deleted must not hide the others; a server that is away is another matter
            with contextlib.suppress(OSError, ValueError):
                workers += _post(f"{self._api}/work_pools/{pool}/workers/filter", {})
        self._offline = {worker["name"] for worker in workers if worker["status"] == "OFFLINE"}
        silent = before & self._offline
        self._offline -= silent  # a fresh one gets its time
        return silent


def visible_gpus(choice: str) -> tuple[str, ...]:
    """Return the GPUs to use, each by the name that ``CUDA_VISIBLE_DEVICES`` has for it.

    Args:
        choice: ``all`` there are (those in ``CUDA_VISIBLE_DEVICES`` where it is set), ``none``, or a list.

    Raises:
        SettingsError: it is none of these, or names a GPU that is not there.
    """
    if choice == "none":
        return ()
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    counted = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"], capture_output=True, text=True
    )
    number = int(counted.stdout.strip() or 0) if counted.returncode == 0 else 0
    there = tuple(shown.split(",")[:number]) if shown else tuple(str(index) for index in range(number))
    if choice == "all":
        return there
    asked = tuple(part.strip() for part in choice.split(","))
    missing = [gpu for gpu in asked if gpu not in there]
    if missing:
        has = f"GPUs {', '.join(there)}" if there else "no GPU that torch can use"
        raise SettingsError(f"--gpus: {', '.join(missing)!r} is not there, this machine has {has}; use all or none")
    return asked


def free_ports(options: UpOptions) -> tuple[int, int, int]:
    """Return the three ports, each free at this moment.

    Raises:
        SettingsError: one is taken, or two are the same.
    """
    wanted = {
        "--mlflow-port": options.mlflow_port,
        "--prefect-port": options.prefect_port,
        "--webhook-port": options.webhook_port,
    }
    with contextlib.ExitStack() as held:
        found = []
        for option, port in wanted.items():
            probe = held.enter_context(socket.socket())
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except (OSError, OverflowError) as error:
                raise SettingsError(
                    f"{option}: port {port} on {HOST} is taken; choose another, 0 for any free one"
                ) from error
            found.append(int(probe.getsockname()[1]))
    return found[0], found[1], found[2]


def _start(supervisor: Supervisor, plan: Plan, stop: threading.Event) -> None:
    mlflow, prefect = plan.mlflow(), plan.prefect()
    supervisor.start(mlflow)
    supervisor.start(prefect)
    supervisor.wait_for(mlflow, lambda: answers(f"{plan.mlflow_url}/health"), STARTUP_SECONDS, stop.is_set)
    supervisor.wait_for(prefect, lambda: answers(f"{plan.prefect_url}/api/health"), STARTUP_SECONDS, stop.is_set)
    if stop.is_set():
        return
    _set_up_prefect(supervisor, plan)
    _hand_out_again(f"{plan.prefect_url}/api")
    for worker in plan.workers():
        supervisor.start(worker)
    webhook = plan.webhook()
    supervisor.start(webhook)
    supervisor.wait_for(webhook, lambda: answers(f"{plan.webhook_url}/health"), STARTUP_SECONDS, stop.is_set)


def _set_up_prefect(supervisor: Supervisor, plan: Plan) -> None:
    """Run ``gradaudit setup`` in a process of its own: it imports all flows, and this process lives for long."""
    done = subprocess.run(
        [*PYTHON, "-m", "flows.cli", "setup"],
        env=plan.environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        start_new_session=True,
    )
    if done.returncode:
        raise InfrastructureError(f"the deployments could not be set up: {done.stderr.strip()[-1000:]}")


def _hand_out_again(api: str) -> None:
    """Schedule anew what an earlier end of this service left running: none of it can be alive, its workers are ours."""
    states = {"flow_runs": {"state": {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}}, "limit": 200}
    state = {"type": "SCHEDULED", "name": "AwaitingRetry", "message": "left unfinished when gradaudit was stopped"}
    for run in _post(f"{api}/flow_runs/filter", states):
        if run["deployment_id"]:
            _post(f"{api}/flow_runs/{run['id']}/set_state", {"state": state, "force": True})
        else:
            crashed = {"type": "CRASHED", "message": "its command was stopped"}
            _post(f"{api}/flow_runs/{run['id']}/set_state", {"state": crashed, "force": True})


def _post(url: str, body: object) -> list[dict[str, str]]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        found: list[dict[str, str]] = json.load(answer)
        return found


def answers(url: str) -> bool:
    """Return whether something speaks HTTP at ``url``."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except urllib.error.HTTPError:
        return True  # what it thinks of the other services is not asked here
    except OSError:
        return False


def _stop_signal() -> threading.Event:
    """Return the event that SIGINT, SIGTERM and SIGHUP set."""
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, on_signal)
    return stop


def _places(plan: Plan, seconds: float) -> str:
    workers = f"{len(plan.gpus)} GPU{'s' if len(plan.gpus) != 1 else ''}" if plan.gpus else "the CPU"
    return f"""\
gradaudit is up after {seconds:.0f} s, auditing on {workers}; Ctrl-C stops it, the data stays.

  MLflow    {plan.mlflow_url}
  Prefect   {plan.prefect_url}
  webhook   {plan.webhook_url}/health
  results   {plan.results}
  logs      {plan.folder / "logs"}

Register models with MLFLOW_TRACKING_URI={plan.mlflow_url}: each version is audited within a minute.
The sweep runs nightly; now:  PREFECT_API_URL={plan.prefect_url}/api prefect deployment run nightly-audit/nightly"""
